"""What a participant's private text adds over public text, found out on its own machine before it joins.

Three models are pruned alike: with public text, with public text and the participant's own, half and half,
and with its own text alone. All are measured on a part of its own text that none of them has seen. The
windows of that part are the sample from which the interval comes (`fedprllm.study.intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fedprllm.api import prune
from fedprllm.config import PruneConfig
from fedprllm.errors import ConfigError, DataError
from fedprllm.evaluation.perplexity import window_losses
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.models.tokenizer import load_tokenizer
from fedprllm.progress import Progress, silent
from fedprllm.pruning.inputs import make_participants
from fedprllm.study.data import split
from fedprllm.study.intervals import interval
from fedprllm.text.windows import evaluation_windows

__all__ = ["Gain", "Worth", "worth_it"]

_FEWEST_WINDOWS = 4


@dataclass(frozen=True)
class Gain:
    """By how much one model's perplexity is below another's, as a fraction of the other's.

    Attributes:
        value: The estimate; negative if it is above.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves no doubt about the sign."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Worth:
    """What a participant's own text is worth to it.

    Attributes:
        perplexity: On its held-out text, of the models ``dense``, ``public``, ``together`` and ``own``.
        over_public: What its own text adds to public text: ``together`` compared with ``public``.
        over_own: What public text adds to its own: ``together`` compared with ``own``.
        n_windows: Number of calibration windows of each model.
        n_tokens: Number of held-out tokens that were predicted.
    """

    perplexity: dict[str, float]
    over_public: Gain
    over_own: Gain
    n_windows: int
    n_tokens: int


def worth_it(
    model: str | Path,
    data: Sequence[str | Path],
    public: Sequence[str | Path],
    config: PruneConfig,
    *,
    eval_tokens: int = 16384,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Worth:
    """Measure what one's own text adds over public text. Nothing leaves the machine, and nothing is kept.

    Args:
        model: Hub id, local folder or GGUF file.
        data: The participant's own text.
        public: Text that anyone has.
        config: How to prune. Every model gets twice its ``windows``.
        eval_tokens: Most held-out tokens to measure on.
        folder: Folder for temporary files; the system's by default.
        progress: Notified of every window that went through a block.

    Raises:
        ConfigError, DataError, ModelError: An input is invalid; detected before anything is computed.
    """
    if config.smaller is not None:
        raise ConfigError(
            f"smaller {config.smaller:g} could choose another structure for every model that is compared: "
            "name one structure for all"
        )
    opened = BlockwiseModel(
        resolve_model(model, progress=progress), config.dtype, config.device, config.exclude
    )
    with TemporaryDirectory(prefix="fedprllm-", dir=folder) as name:
        scratch = Path(name)
        texts, held_out, config = _texts(
            opened, list(map(str, data)), list(public), config, eval_tokens, scratch
        )
        losses = {"dense": window_losses(opened, held_out, progress)}
        for which, windows in texts.items():
            result = prune(opened.folder, windows, config, out=scratch / which, progress=progress)
            pruned = BlockwiseModel(result.model_dir, config.dtype, config.device)
            losses[which] = window_losses(pruned, held_out, progress)
    sizes = torch.tensor([len(window) - 1 for window in held_out], dtype=torch.float64)
    sums = {which: torch.tensor(each, dtype=torch.float64) for which, each in losses.items()}
    return Worth(
        {which: math.exp(float(each.sum() / sizes.sum())) for which, each in sums.items()},
        _gain(sums["public"], sums["together"], sizes),
        _gain(sums["own"], sums["together"], sizes),
        2 * config.windows,
        int(sizes.sum()),
    )


def _texts(
    model: BlockwiseModel,
    data: list[str],
    public: list[str | Path],
    config: PruneConfig,
    eval_tokens: int,
    scratch: Path,
) -> tuple[dict[str, dict[str, Tensor]], list[Tensor], PruneConfig]:
    """The windows of each model's participants, the held-out windows, and the configuration in full."""
    calibration, held_out = split(data, "own", scratch, eval_tokens)
    twice = config.model_copy(update={"windows": 2 * config.windows})
    members, full = make_participants(model, {"own": calibration, "public": public}, twice)
    assert full.window_length is not None, "make_participants chooses one"
    n, windows = config.windows, {member.name: member.windows for member in members}
    for name, found in windows.items():
        if len(found) < 2 * n:
            raise DataError(
                f"the {name} text has {len(found)} windows of {full.window_length} tokens, expected {2 * n}, "
                "twice --windows, so that all models have equally much: provide more text, or choose fewer "
                "or shorter windows"
            )
    measured = evaluation_windows(
        [held_out],
        load_tokenizer(model.folder),
        window_length=full.window_length,
        bos=config.bos,
        max_tokens=eval_tokens,
        vocabulary_size=model.vocabulary_size,
    )
    if len(measured) < _FEWEST_WINDOWS:
        raise DataError(
            f"the held-out part of the own text has {len(measured)} windows of {full.window_length} tokens, "
            f"expected at least {_FEWEST_WINDOWS} for an interval: provide more text, choose shorter windows "
            "or raise --eval-tokens"
        )
    texts = {
        "public": {"public": windows["public"]},
        "together": {name: found[:n] for name, found in windows.items()},
        "own": {"own": windows["own"]},
    }
    return texts, measured, config.model_copy(update={"window_length": full.window_length})


def _gain(before: Tensor, after: Tensor, sizes: Tensor) -> Gain:
    """How far the perplexity falls from one model to the other, with the interval over the windows."""
    value = float((before - after).sum() / sizes.sum())
    ends = interval([before - after], [sizes], "worth it")
    return Gain(*(-math.expm1(-each) for each in (value, *ends)))
