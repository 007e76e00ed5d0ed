"""The results of a study as numbers: means over seeds and paired comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import mean, stdev
from typing import Any

from fedprllm.evaluation.results import Perplexity
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
    """

    axis: str
    base: Any
    other: Any
    values: tuple[float, ...]

    def __str__(self) -> str:
        worse = sum(value > 0 for value in self.values)
        ratio = math.exp(mean(self.values)) if mean(self.values) < 700 else math.inf
        base, other = (_word(self.axis, value) for value in (self.base, self.other))
        spread = f", from {min(self.values):+.4f} to {max(self.values):+.4f}" if len(self.values) > 1 else ""
        return (
            f"{other} versus {base}: {mean(self.values):+.4f} nats per token{spread} (perplexity times "
            f"{_ratio(ratio)}); worse in {worse} of {len(self.values)} pairs."
        )


def _ratio(ratio: float) -> str:
    return f"{ratio:,.3f}" if ratio >= 0.01 else f"{ratio:.1e}"


def paired(cells: Sequence[Measured], axis: str, base: Any, other: Any) -> Difference | None:
    """Compare two values of an axis over all pairs of cells that agree in everything else."""
    found: dict[str, dict[Any, dict[str, float]]] = {}
    for cell, record in cells:
        rest = {name: value for name, value in cell.setting.items() if name != axis}
        value = _meant(cell, axis)
        losses = {
            text: mean(row.nll for rows in record.models.values() for row in rows if row.text == text)
            for text in texts_of([(cell, record)])
        }
        found.setdefault(json.dumps([rest, cell.config.seed], sort_keys=True), {})[value] = losses
    values = [
        pair[other][text] - pair[base][text]
        for pair in found.values()
        if base in pair and other in pair
        for text in pair[base]
    ]
    return Difference(axis, base, other, tuple(values)) if values else None


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
        where = _word(known.by, _meant(cell, known.by)) if known.by else ""
        parts.setdefault(where, []).append((cell, record))
    sentences = []
    for name, part in parts.items():
        differences = [paired(part, *pair) for pair in known.pairs]
        where = f"At {name}: " if len(parts) > 1 else ""
        sentences += [where + str(difference) for difference in differences if difference is not None]
        gap = closed_gap(part)
        if gap is not None:
            closes = (
                f"closes {gap:.0%} of the gap between local-only and centralized"
                if gap >= 0
                else "is worse than local-only, although centralized is better"
            )
            sentences.append(f"{where}one-shot {closes}.")
    return sentences
