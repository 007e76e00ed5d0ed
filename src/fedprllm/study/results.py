"""The results of a study as numbers: means over seeds and paired comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import mean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.evaluation.results import Perplexity
from fedprllm.study.intervals import interval
from fedprllm.study.questions import QUESTIONS, Cell, StudyConfig
from fedprllm.study.records import CellRecord, StudiedModel

__all__ = [
    "Difference",
    "Results",
    "Spread",
    "how_made",
    "name_of",
    "names_of_settings",
    "paired",
    "spread_by_text",
]

Measured = tuple[Cell, CellRecord]
Whose = Literal["any", "own", "others"]


@dataclass(frozen=True)
class Results:
    """A complete study.

    Attributes:
        config: The study's configuration.
        cells: All cells, each with its measurements.
        dense: Perplexities of the unpruned model.
        model: The model.
        versions: Versions of the software that the exact bits depend on.
    """

    config: StudyConfig
    cells: list[Measured]
    dense: list[Perplexity]
    model: StudiedModel
    versions: dict[str, str]

    def of(self, question: str) -> list[Measured]:
        """The cells that answer a question."""
        return [(cell, record) for cell, record in self.cells if question in cell.questions]

    @property
    def questions(self) -> list[str]:
        """The questions asked: those from the table, followed by the study's own grids."""
        return list(dict.fromkeys(question for cell, _ in self.cells for question in cell.questions))


@dataclass(frozen=True)
class Spread:
    """A perplexity over several seeds.

    Attributes:
        values: One value per seed: the mean over the models that the seed gave.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return mean(self.values)

    @property
    def sd(self) -> float:
        """Standard deviation over seeds; 0 with one seed."""
        return stdev(self.values) if len(self.values) > 1 and all(map(math.isfinite, self.values)) else 0.0

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "∞"
        digits = 2 if self.mean < 1000 else 0
        spread = f" ± {self.sd:,.{digits}f}" if len(self.values) > 1 else ""
        return f"{self.mean:,.{digits}f}{spread}"


def perplexity_of(rows: Sequence[Perplexity], text: str) -> float:
    """Perplexity of one model on one text."""
    return next(row.perplexity for row in rows if row.text == text)


def models_on(record: CellRecord, text: str) -> dict[str, float]:
    """Perplexity of each model of a cell on a text; the paper reports the mean over participants."""
    return {name: perplexity_of(rows, text) for name, rows in record.models.items()}


def texts_of(cells: Sequence[Measured]) -> list[str]:
    """Names of the texts that the cells were measured on."""
    return list(
        dict.fromkeys(row.text for _, record in cells for rows in record.models.values() for row in rows)
    )


def name_of(cell: Cell, among: Sequence[Cell]) -> str:
    """Name a setting by what distinguishes it from others: ``one-shot`` or ``local row, server column``."""
    varying = [axis for axis in cell.setting if len({json.dumps(other.setting[axis]) for other in among}) > 1]
    words = [_word(axis, _meant(cell, axis)) for axis in varying]
    return ", ".join(words) or cell.config.strategy


def names_of_settings(cells: Sequence[Cell]) -> dict[str, str]:
    """The name of every setting among cells by the setting's key; no two settings have one name."""
    names = {cell.setting_key: name_of(cell, cells) for cell in cells}
    assert len(set(names.values())) == len(names), "two settings would be averaged as if they were seeds"
    return names


def _meant(cell: Cell, axis: str) -> Any:
    """The value of an axis; a server that names no rule for equal votes has the participants'."""
    value = cell.setting[axis]
    return cell.config.ties if axis == "server_ties" and value is None else value


def _word(axis: str, value: Any) -> str:
    """A value of an axis in words, different for different values."""
    if axis == "sparsity":
        return f"{(100 * Decimal(repr(value))).normalize():f}%"
    short = {
        "strategy": "{}",
        "ties": "local ties {}",
        "local_group": "local {}",
        "server_group": "server {}",
        "server_ties": "ties {}",
        "share": "{}",
        "criterion": "{}",
        "participants": "{} participants",
        "windows": "{} windows",
        "partition": "{}",
        "pattern": "{}",
        "allocation": "{}",
    }
    if axis == "scale_weights":
        return "scaled" if value else "not scaled"
    return short.get(axis, axis.replace("_", " ") + " {}").format(value)


def _is_implied(config: PruneConfig, axis: str) -> bool:
    """Whether other options of the cell say the value of an axis."""
    has_pattern, has_structure = config.n_m is not None, config.structure is not None
    implied = {
        "structure": not has_structure,
        "share": has_structure,
        "pattern": not has_pattern,
        "sparsity": has_pattern or has_structure,
    }
    return implied.get(axis, False)


def _order(cells: Sequence[Cell]) -> Callable[[Measured], list[int]]:
    """A sort key that orders cells axis by axis, and the values of an axis as they first appear."""
    seen: dict[str, dict[str, int]] = {}
    for cell in cells:
        for axis, value in cell.setting.items():
            places = seen.setdefault(axis, {})
            places.setdefault(json.dumps(value), len(places))
    return lambda measured: [seen[axis][json.dumps(value)] for axis, value in measured[0].setting.items()]


def spread_by_text(cells: Sequence[Measured]) -> dict[str, dict[str, Spread]]:
    """Mean and spread over seeds by setting and text; similar settings are adjacent."""
    all_cells = [cell for cell, _ in cells]
    names = names_of_settings(all_cells)
    values: dict[str, dict[str, list[float]]] = {}
    for cell, record in sorted(cells, key=_order(all_cells)):
        row = values.setdefault(names[cell.setting_key], {})
        for text in texts_of([(cell, record)]):
            row.setdefault(text, []).append(mean(models_on(record, text).values()))
    return {name: {text: Spread(tuple(some)) for text, some in row.items()} for name, row in values.items()}


@dataclass(frozen=True)
class Difference:
    """A paired comparison of two values of an axis with all else equal, including seed and text.

    Attributes:
        axis: The axis that differs.
        base: Value of the axis to compare with.
        other: Value of the axis to compare.
        values: ``nll(other) - nll(base)`` for each pair, in nats per token.
        interval: Ends of the 95 % interval of their mean (`fedprllm.study.intervals`); None if the losses of
            single windows are unknown.
    """

    axis: str
    base: Any
    other: Any
    values: tuple[float, ...]
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        worse = sum(value > 0 for value in self.values)
        ratio = math.exp(mean(self.values)) if mean(self.values) < 700 else math.inf
        base, other = (_word(self.axis, value) for value in (self.base, self.other))
        spread = f", from {min(self.values):+.4f} to {max(self.values):+.4f}" if len(self.values) > 1 else ""
        return (
            f"{other} versus {base}: {mean(self.values):+.4f} nats per token{spread} (perplexity times "
            f"{_ratio(ratio)}{self._ends()}); worse in {worse} of {len(self.values)} pairs."
        )

    def _ends(self) -> str:
        if self.interval is None:
            return ""
        low, high = (math.exp(min(end, 700)) for end in self.interval)
        return f", 95 % interval {_ratio(low)} to {_ratio(high)}"


def _ratio(ratio: float) -> str:
    return f"{ratio:,.3f}" if ratio >= 0.01 else f"{ratio:.1e}"


def paired(
    cells: Sequence[Measured], axis: str, base: Any, other: Any, whose: Whose = "any"
) -> Difference | None:
    """Compare two values of an axis over all pairs of cells that agree in everything else.

    Args:
        cells: The cells.
        axis: The axis.
        base: Value to compare with.
        other: Value to compare.
        whose: Of models that participants make alone, which to measure on a text: the one made with such text
            alone (``own``), the ``others``, or ``any``, which means all.
    """
    found: dict[str, dict[Any, dict[str, _Loss]]] = {}
    for cell, record in cells:
        # How text is distributed also says among how many.
        varied = (axis, "participants") if axis == "partition" else (axis,)
        rest = {name: value for name, value in cell.setting.items() if name not in varied}
        value = _meant(cell, axis)
        losses = {text: _Loss.of(record, text, whose) for text in texts_of([(cell, record)])}
        found.setdefault(json.dumps([rest, cell.config.seed], sort_keys=True), {})[value] = losses
    pairs = [(pair[base], pair[other]) for pair in found.values() if base in pair and other in pair]
    values = [after[text].nll - before[text].nll for before, after in pairs for text in before]
    return Difference(axis, base, other, tuple(values), _interval(pairs)) if values else None


def _models_for(record: CellRecord, text: str, whose: Whose) -> list[str]:
    """The models to measure on a text: the one pruned with such text alone, or the others, or all."""
    names = list(record.models)
    if whose == "any" or text not in names:
        return names
    return [text] if whose == "own" else [name for name in names if name != text]


@dataclass(frozen=True)
class _Loss:
    """Losses on a text, averaged over the models of a cell.

    Attributes:
        nll: Mean over tokens, in nats.
        by_window: The same for each window; None if unknown.
    """

    nll: float
    by_window: Tensor | None

    @classmethod
    def of(cls, record: CellRecord, text: str, whose: Whose) -> _Loss:
        models = _models_for(record, text, whose)
        rows = [row for name in models for row in record.models[name] if row.text == text]
        kept = record.window_losses
        if kept is None:
            return cls(mean(row.nll for row in rows), None)
        # All windows of a text are equally long.
        each = torch.tensor([kept[name][text] for name in models], dtype=torch.float64).mean(dim=0)
        return cls(mean(row.nll for row in rows), each * len(each) / rows[0].n_tokens)


def _together_or_alone(cells: Sequence[Measured]) -> list[str]:
    """What participants with text of their own kinds gain on it, and on the others', by pruning together."""
    of_domains = [(cell, record) for cell, record in cells if cell.partition == "domain"]
    whose: dict[str, Whose] = {"a participant's own text": "own", "the others' text": "others"}
    found = [
        (words, paired(of_domains, "strategy", "local-only", together, which))
        for words, which in whose.items()
        for together in ("iterative", "one-shot")
    ]
    return [f"on {words}, {difference}" for words, difference in found if difference is not None]


def _interval(pairs: Sequence[tuple[Mapping[str, _Loss], Mapping[str, _Loss]]]) -> tuple[float, float] | None:
    """The interval of the mean difference; a window counts with all of its pairs at once."""
    by_text: dict[str, list[Tensor]] = {}
    for before, after in pairs:
        for text in before:
            first, second = before[text].by_window, after[text].by_window
            if first is None or second is None:
                return None
            by_text.setdefault(text, []).append(second - first)
    means = [torch.stack(each).mean(dim=0) for each in by_text.values()]
    return interval(means, [torch.ones_like(each) for each in means], "study") if means else None


def closed_gap(cells: Sequence[Measured]) -> float | None:
    """Fraction of the gap between local-only and centralized that one-shot closes; 1 means all of it.

    Computed from mean losses over paired seeds, texts and settings. None if a strategy was not measured, or
    if centralized is no better than local-only.
    """
    alone = paired(cells, "strategy", "local-only", "one-shot")
    pooled = paired(cells, "strategy", "local-only", "centralized")
    if alone is None or pooled is None or mean(pooled.values) >= 0:
        return None
    return mean(alone.values) / mean(pooled.values)


def tie_shares(cells: Sequence[Measured]) -> dict[str, float]:
    """Fraction of the prunes that a tie rule decided by setting, averaged over seeds."""
    all_cells = [cell for cell, _ in cells]
    names = names_of_settings(all_cells)
    values: dict[str, list[float]] = {}
    for cell, record in cells:
        values.setdefault(names[cell.setting_key], []).append(record.tie_share)
    return {name: mean(shares) for name, shares in values.items()}


def how_made(cells: Sequence[Measured]) -> dict[str, str]:
    """How the pruned weights of each setting came about: by a run of its own, or derived."""
    names = names_of_settings([cell for cell, _ in cells])
    made: dict[str, set[str]] = {}
    for cell, record in cells:
        made.setdefault(names[cell.setting_key], set()).add(record.made)
    return {name: " and ".join(sorted(ways)) for name, ways in made.items()}


def answers(results: Results, question: str) -> list[str]:
    """The paired comparisons of a question as sentences."""
    cells, known = results.of(question), QUESTIONS.get(question)
    if known is None:
        return []
    parts: dict[str, list[Measured]] = {}
    for cell, record in cells:
        where = ", ".join(
            _word(axis, _meant(cell, axis)) for axis in known.by if not _is_implied(cell.config, axis)
        )
        parts.setdefault(where, []).append((cell, record))
    sentences = []
    for name, part in parts.items():
        differences = [paired(part, *pair) for pair in known.pairs]
        where = f"At {name}: " if len(parts) > 1 else ""
        sentences += [where + str(difference) for difference in differences if difference is not None]
        sentences += [where + sentence for sentence in _together_or_alone(part)]
        gap = closed_gap(part)
        if gap is not None:
            closes = (
                f"closes {gap:.0%} of the gap between local-only and centralized"
                if gap >= 0
                else "is worse than local-only, although centralized is better"
            )
            sentences.append(f"{where}one-shot {closes}.")
    return sentences
