"""Every perplexity that was measured: this run's models and the models they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedprllm.report import plots
from fedprllm.report.drawing import draw
from fedprllm.report.facts import Facts
from fedprllm.report.layout import Cell, Part, Plot, Section, Table
from fedprllm.report.words import change, perplexity

__all__ = ["perplexities"]

# With more models than this, the figure shows a summary; the table always lists all of them.
_MAX_DRAWN = 12
_TWO = 2  # the dense model and another one, which the answer has already
_MAX_COLUMNS = 6


def perplexities(facts: Facts) -> Section | None:
    """All models on all texts; None if nothing was measured."""
    models = facts.measured
    if not models:
        return None
    own = [name for name in dict.fromkeys((*facts.pruned_models[1], "federated")) if name in models]
    values = {model: {row.text: row.perplexity for row in rows} for model, rows in models.items()}
    texts = list(dict.fromkeys(text for row in values.values() for text in row))
    parts: list[Part] = []
    if len(values) > _TWO:
        parts += ["Lower is better; changes are relative to the dense model.", _table(values, texts, own)]
    n_tokens = {row.text: row.n_tokens for rows in models.values() for row in rows}
    measured = "; ".join(f"{text}: {n:,}" for text, n in n_tokens.items())
    shown, colors = _to_draw(values, own)
    groups = {text: {model: row[text] for model, row in shown.items() if text in row} for text in texts}
    figure = draw(plots.grouped_bars, groups, colors, _describe(groups), "perplexity")
    caption = f"Perplexity by text; lower is better. Number of predicted tokens: {measured}."
    return Section("perplexity", "Perplexity of every model", [*parts, Plot(figure, caption)])


def _table(values: Mapping[str, Mapping[str, float]], texts: Sequence[str], own: Sequence[str]) -> Table:
    """One row per model or, if there are many texts, one row per text."""
    dense = values.get("dense", {})

    def cell(model: str, text: str) -> Cell:
        value = values[model].get(text)
        if value is None:
            return Cell("")
        return Cell(
            perplexity(value), change(value, dense[text]) if model != "dense" and text in dense else ""
        )

    if len(texts) > max(_MAX_COLUMNS, len(values)):
        by_text: list[list[str | Cell]] = [[text, *(cell(model, text) for model in values)] for text in texts]
        columns = ("text", *values)
        return Table(
            "Perplexity by text and model", columns, "l" + "r" * len(values), by_text, frozenset(), True
        )
    rows: list[list[str | Cell]] = [[model, *(cell(model, text) for text in texts)] for model in values]
    strong = frozenset(number for number, model in enumerate(values) if len(own) == 1 and model in own)
    return Table(
        "Perplexity by model and text", ("model", *texts), "l" + "r" * len(texts), rows, strong, True
    )


def _to_draw(
    values: Mapping[str, Mapping[str, float]], own: Sequence[str]
) -> tuple[dict[str, Mapping[str, float]], dict[str, int]]:
    """The models to draw, and their colors: one for each family, and one for the run's own model.

    A family are the models that participants made alone in one way. Of many models, only the lowest and the
    highest of each family are drawn.
    """
    families: dict[str, list[str]] = {}
    for model in values:
        families.setdefault(model.split(":")[0] if ": " in model else model, []).append(model)
    shown: dict[str, Mapping[str, float]] = {}
    colors: dict[str, int] = {}
    for family, models in families.items():
        some = {model: values[model] for model in models}
        if len(values) > _MAX_DRAWN and len(models) > 1:
            some = _ends(family, list(some.values()))
        number = 0 if family == "dense" else 1 if set(models) & set(own) else 1 + max(1, *colors.values(), 1)
        shown |= some
        colors |= dict.fromkeys(some, number)
    return shown, colors


def _ends(family: str, rows: Sequence[Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The lowest and the highest value of a family on each text."""
    texts = dict.fromkeys(text for row in rows for text in row)
    found = {text: [row[text] for row in rows if text in row] for text in texts}
    return {
        f"{family}, lowest of {len(rows)}": {text: min(each) for text, each in found.items()},
        f"{family}, highest of {len(rows)}": {text: max(each) for text, each in found.items()},
    }


def _describe(groups: Mapping[str, Mapping[str, float]]) -> str:
    parts = [
        f"{text}: " + ", ".join(f"{model} {perplexity(value)}" for model, value in rows.items())
        for text, rows in groups.items()
    ]
    return f"Perplexity. {'; '.join(parts)}."
