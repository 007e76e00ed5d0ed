"""What healing lowers: the loss of predicting the next token, or the distance to the dense model.

Both are sums over the predicted positions of a window, so they and their gradients add up over windows and
participants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedprllm.models.block import Hidden
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.open_blocks import OpenBlocks

__all__ = ["DenseDistance", "NextToken", "Objective"]

_Target = Hidden | None
_Logits = Iterator[Float[Tensor, "positions vocabulary"]]


class Objective(Protocol):
    """The loss of a model's predictions on a window."""

    def targets(self, windows: Sequence[Tensor]) -> list[_Target]:
        """What the losses of windows are computed from besides the windows, one for each."""

    def head(self) -> AbstractContextManager[None]:
        """Hold in memory what `losses` needs."""

    def losses(self, logits: _Logits, window: Tensor, target: _Target) -> Iterator[Tensor]:
        """Yield the sum of the losses of each chunk of positions, in nats; call this inside `head`.

        Args:
            logits: The model's logits by chunk, as from `BlockwiseModel.logits`.
            window: Token ids, int64 [tokens].
            target: What `targets` returned for the window.
        """


class NextToken:
    """The loss of predicting the next token."""

    def targets(self, windows: Sequence[Tensor]) -> list[_Target]:
        """See `Objective`; a window holds its own targets."""
        return [None for _ in windows]

    def head(self) -> AbstractContextManager[None]:
        """See `Objective`."""
        return nullcontext()

    def losses(self, logits: _Logits, window: Tensor, target: _Target) -> Iterator[Tensor]:  # noqa: ARG002
        """See `Objective`."""
        start = 1
        for chunk in logits:
            tokens = window[start : start + len(chunk)].to(chunk.device)
            start += len(chunk)
            yield nn.functional.cross_entropy(chunk, tokens, reduction="sum")


class DenseDistance:
    """The Kullback-Leibler divergence from a dense model's next-token distribution to the healed model's.

    It teaches no text: the model is asked to predict what the dense model predicts (Hinton et al.,
    arXiv 1503.02531, with temperature 1).

    Args:
        model: The dense model.
        blocks: Its blocks.
    """

    def __init__(self, model: BlockwiseModel, blocks: OpenBlocks) -> None:
        self._model, self._blocks = model, blocks

    @torch.no_grad()
    def targets(self, windows: Sequence[Tensor]) -> list[_Target]:
        """See `Objective`: the outputs of the dense model's last block."""
        hidden = list(self._model.embed(windows))
        for index in range(self._model.n_blocks):
            with self._blocks.at(index):
                hidden = [self._model.run_block(index, state) for state in hidden]
        return list(hidden)

    def head(self) -> AbstractContextManager[None]:
        """See `Objective`."""
        return self._model.head()

    def losses(self, logits: _Logits, window: Tensor, target: _Target) -> Iterator[Tensor]:
        """See `Objective`."""
        assert target is not None
        for chunk, expected in zip(logits, self._predictions(target, window), strict=True):
            found = nn.functional.log_softmax(chunk, -1)
            # Rounding takes a distance of zero below it.
            yield nn.functional.kl_div(found, expected, reduction="sum", log_target=True).clamp_min(0)

    @torch.no_grad()
    def _predictions(self, hidden: Hidden, window: Tensor) -> Iterator[Tensor]:
        for chunk in self._model.logits(hidden, window):
            yield nn.functional.log_softmax(chunk, -1)
