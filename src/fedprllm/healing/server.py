"""What the server does in a round: one step of Adam with the sum of all gradients.

Participants measure the loss on windows that are held out from the gradients, and share its sum. The
parameters with the lowest such loss are the result. Where the loss rises by more than a little, the server
takes the parameters back to the best ones and halves its steps: whatever a gradient was made from, the
result is not worse than the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fedprllm.errors import RunError, UpdateError
from fedprllm.healing.bounds import outstanding_gradients
from fedprllm.healing.config import HealConfig
from fedprllm.healing.records import RoundRecord
from fedprllm.healing.round_sums import RoundSums

__all__ = ["HealingServer", "end_masked_round", "end_round"]

_WARM_UP = 5  # rounds
_BETAS = (0.9, 0.99)
_TOLERATED_RISE = 1.01  # of the held-out loss over the best one


class HealingServer:
    """The parameters, and Adam's moments of their gradient (Kingma & Ba, arXiv 1412.6980).

    Args:
        initial: The parameters' values before the first round.
        config: The options of healing.

    Attributes:
        number: Number of the round that comes next, or is going on.
        best_round: Round that began with the best parameters so far.
        best_loss: Their loss on held-out windows; NaN before the first measurement.
        n_taken_back: How often parameters were taken back.
    """

    def __init__(self, initial: Float[Tensor, " n"], config: HealConfig) -> None:
        self._config = config
        self._vector = torch.nn.Parameter(initial.clone())
        self._best = initial.clone()
        self.number, self.best_round, self.n_taken_back = 0, 0, 0
        self.best_loss = math.nan
        self._adam = self._fresh()

    def _fresh(self) -> torch.optim.Adam:
        return torch.optim.Adam([self._vector], betas=_BETAS, foreach=False)

    @property
    def vector(self) -> Float[Tensor, " n"]:
        """The parameters with which the next round begins."""
        return self._vector.detach()

    @property
    def result(self) -> Float[Tensor, " n"]:
        """The best parameters; the newest if nothing is held out."""
        return self.vector if math.isnan(self.best_loss) else self._best

    @property
    def learning_rate(self) -> float:
        """Step of this round: a linear rise over five rounds, then half a cosine down to zero."""
        progress = self.number / self._config.rounds
        shape = min(1.0, (self.number + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))
        rate: float = self._config.learning_rate * shape / 2**self.n_taken_back
        return rate

    @property
    def is_finished(self) -> bool:
        """Whether nothing remains to be done; after the last step there is one more measurement."""
        return self.number > self._config.rounds

    def take(self, sums: RoundSums) -> None:
        """End a round, given the sums over its participants.

        Raises:
            RunError: Nobody contributed.
        """
        if not sums.n_tokens and not sums.n_held_out and self.number < self._config.rounds:
            raise RunError(f"round {self.number} has no tokens: expected at least one participant's gradient")
        if not self._is_worse(sums) and self.number < self._config.rounds and sums.n_tokens:
            self._step(sums.gradient)
        self.number += 1

    def _is_worse(self, sums: RoundSums) -> bool:
        """Compare the parameters that the round began with to the best; take them back if they are worse."""
        loss = sums.held_out_loss
        if math.isnan(loss):
            return False
        if math.isnan(self.best_loss) or loss < self.best_loss:
            self.best_loss, self.best_round = loss, self.number
            self._best.copy_(self.vector)
        if loss <= self.best_loss * _TOLERATED_RISE:
            return False
        self._vector.data.copy_(self._best)
        self._adam = self._fresh()
        self.n_taken_back += 1
        return True

    def _step(self, gradient: Float[Tensor, " n"]) -> None:
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate
        self._vector.grad = gradient.to(torch.float32)
        self._adam.step()
        self._vector.grad = None

    # A killed run continues --------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything between two rounds that is a tensor."""
        state = self._adam.state.get(self._vector, {})
        moments = {name: value.clone() for name, value in state.items()}
        return {"vector": self.vector.clone(), "best": self._best.clone(), **moments}

    def figures(self) -> dict[str, float | int | None]:
        """Everything between two rounds that is a number."""
        return {
            "number": self.number,
            "best_round": self.best_round,
            "n_taken_back": self.n_taken_back,
            "best_loss": None if math.isnan(self.best_loss) else self.best_loss,
        }

    def restore(self, tensors: Mapping[str, Tensor], figures: Mapping[str, float | int | None]) -> None:
        """Continue from what `tensors` and `figures` returned."""
        self._vector.data.copy_(tensors["vector"])
        self._best.copy_(tensors["best"])
        for name in ("number", "best_round", "n_taken_back"):
            setattr(self, name, figures[name])
        loss = figures["best_loss"]
        self.best_loss = math.nan if loss is None else loss
        self._adam = self._fresh()
        moments = {name: tensor.clone() for name, tensor in tensors.items() if name not in ("vector", "best")}
        if moments:
            self._adam.state[self._vector] = moments


def end_round(server: HealingServer, by_name: Mapping[str, RoundSums], begin: float) -> RoundRecord:
    """Compare what participants contributed, take the step, and describe the round.

    Args:
        server: The server, before the step.
        by_name: Sums by participant.
        begin: When the round began, by `time.monotonic`.

    Raises:
        UpdateError: A gradient is out of proportion to the other participants'.
    """
    for name, reason in outstanding_gradients(by_name).items():
        raise UpdateError(f"participant '{name}': {reason}")
    total = sum(by_name.values(), start=RoundSums.zeros(len(server.vector)))
    losses = {name: one.loss for name, one in by_name.items() if one.n_tokens}
    return end_masked_round(server, total, begin).model_copy(update={"losses": losses})


def end_masked_round(server: HealingServer, total: RoundSums, begin: float) -> RoundRecord:
    """Take the step and describe the round, where only the sum over participants is known.

    Args:
        server: The server, before the step.
        total: The sum.
        begin: When the round began, by `time.monotonic`.
    """
    number, rate, taken_back = server.number, server.learning_rate, server.n_taken_back
    server.take(total)
    return RoundRecord(
        number=number,
        learning_rate=rate,
        n_tokens=total.n_tokens,
        loss=_known(total.loss),
        held_out_loss=_known(total.held_out_loss),
        taken_back=server.n_taken_back > taken_back,
        seconds=time.monotonic() - begin,
        figures=server.figures(),
    )


def _known(loss: float) -> float | None:
    return None if math.isnan(loss) else loss
