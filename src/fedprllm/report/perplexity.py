"""How pruning changed the perplexity: this run's models and the models they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedprllm.report import plots
from fedprllm.report.facts import Cell, Facts, Perplexities, Plot, Section, Table, change, perplexity

__all__ = ["compared", "evaluated"]

# With more models than this, the figure shows a summary; the table always lists all of them.
_MAX_DRAWN = 12


def evaluated(facts: Facts) -> Section | None:
    """The perplexities measured by the run itself; None if the record holds only a comparison."""
    if facts.evaluation:
        note = "Lower is better; changes are relative to the dense model."
        own = facts.pruned_models[1]
        return Section("perplexity", "Perplexity", [note, *_perplexities(facts.evaluation, own)])
    if facts.comparison:
        return None
    return Section("perplexity", "Perplexity", ["Not measured: the run had no evaluation text."])


def compared(facts: Facts) -> Section | None:
    """The comparison's models, preceded by those models of the run that the comparison lacks."""
    if not facts.comparison:
        return None
    models = {name: rows for name, rows in facts.evaluation.items() if name not in facts.comparison}
    models |= facts.comparison
    own = [name for name in (*facts.pruned_models[1], "federated") if name in models]
    note = "Perplexity; lower is better, and changes are relative to the dense model."
    return Section("comparison", "Comparison with other models", [note, *_perplexities(models, own)])


def _perplexities(models: Perplexities, own: Sequence[str]) -> list[str | Table | Plot]:
    values = {model: {row.text: row.perplexity for row in rows} for model, rows in models.items()}
    texts = list(dict.fromkeys(text for row in values.values() for text in row))
    dense = values.get("dense", {})
    rows: list[list[str | Cell]] = []
    for model, row in values.items():
        cells = [
            Cell(
                perplexity(row[text]),
                change(row[text], dense[text]) if model != "dense" and text in dense else "",
            )
            if text in row
            else Cell("")
            for text in texts
        ]
        rows.append([model, *cells])
    strong = (
        frozenset(number for number, model in enumerate(values) if model in own)
        if len(own) == 1
        else frozenset()
    )
    table = Table(
        "Perplexity by model and text", ("model", *texts), "l" + "r" * len(texts), rows, strong, True
    )
    n_tokens = {row.text: row.n_tokens for rows in models.values() for row in rows}
    measured = "; ".join(f"{text}: {count:,}" for text, count in n_tokens.items())
    shown, colors = _to_draw(values, own)
    groups = {text: {model: row[text] for model, row in shown.items() if text in row} for text in texts}
    figure = plots.grouped_bars(groups, colors, _describe(groups), "perplexity")
    return [table, Plot(figure, f"Perplexity by text. Number of predicted tokens: {measured}.")]


def _to_draw(
    values: Mapping[str, Mapping[str, float]], own: Sequence[str]
) -> tuple[dict[str, Mapping[str, float]], dict[str, int]]:
    """The models to draw: all of them or, if there are many, the lowest, median and highest per text."""
    shown: dict[str, Mapping[str, float]] = dict(values)
    if len(values) > _MAX_DRAWN:
        others = [row for model, row in values.items() if model != "dense"]
        shown = {model: row for model, row in values.items() if model == "dense"}
        for name, rank in {"lowest": 0.0, "median": 0.5, "highest": 1.0}.items():
            shown[f"{name} of {len(others)} models"] = {
                text: sorted(row[text] for row in others)[round(rank * (len(others) - 1))]
                for text in others[0]
            }
    colors: dict[str, int] = {}
    for model in shown:
        family = model.split(":")[0]
        if model == "dense":
            colors[model] = 0
        elif model in own or len(values) > _MAX_DRAWN:
            colors[model] = 1
        else:
            known = {name.split(":")[0]: number for name, number in colors.items() if number > 1}
            colors[model] = known.get(family, 2 + len(known))
    return shown, colors


def _describe(groups: Mapping[str, Mapping[str, float]]) -> str:
    parts = [
        f"{text}: " + ", ".join(f"{model} {perplexity(value)}" for model, value in rows.items())
        for text, rows in groups.items()
    ]
    return f"Perplexity. {'; '.join(parts)}."
