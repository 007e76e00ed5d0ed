"""The page of a study: one section per question with the paper's answer and the study's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from markupsafe import Markup

from fedprllm.files import write_text
from fedprllm.report import plots as report_plots
from fedprllm.report.drawing import draw, standalone
from fedprllm.report.layout import Cell as TableCell
from fedprllm.report.layout import Notes, Page, Part, Plot, Section, Table, render
from fedprllm.report.setting import model_and_versions, options
from fedprllm.report.words import count, percent, perplexity, seconds, size
from fedprllm.study import study_plots as plots
from fedprllm.study.domains import own_and_others
from fedprllm.study.questions import QUESTIONS, Cell
from fedprllm.study.results import (
    Measured,
    Results,
    Spread,
    answers,
    how_made,
    name_of,
    names_of_settings,
    spread_by_text,
    texts_of,
    tie_shares,
)

__all__ = ["write_page"]

# Axes over which curves are drawn, and whether they are logarithmic to base 2.
_NUMBERS = {"participants": True, "windows": True, "sparsity": False}
_NAMES = {"participants": "participants", "windows": "windows per participant", "sparsity": "sparsity"}
_MAX_PANELS = 3
_DASHED = "The dashed line is the dense model, where it lies in the range shown."


def write_page(results: Results, out: Path) -> None:
    """Write ``report.html``, and each of its figures to ``plots/`` as an SVG file."""
    page = _page(results)
    for section in page.sections:
        figures = [part for part in section.parts if isinstance(part, Plot)]
        for number, plot in enumerate(figures):
            name = section.name.replace(" ", "-") + (f"-{number + 1}" if number else "")
            write_text(out / "plots" / f"{name}.svg", standalone(plot.figure.wide))
    write_text(out / "report.html", render(page, "results.json beside this page"))


def _page(results: Results) -> Page:
    model = Path(results.model.source).name
    questions = [_section(results, question) for question in results.questions]
    return Page(
        "a study of federated pruning",
        model,
        _summary(results),
        _tiles(results),
        [_findings(results)],
        questions,
        [_setting(results)],
    )


def _findings(results: Results) -> Section:
    """The lowest perplexity on each text, and the first answer to each question."""
    section = Section("findings", "What was found")
    found = []
    for question in results.questions:
        title = QUESTIONS[question].title if question in QUESTIONS else question
        first = next(iter(answers(results, question)), None)
        link = Markup('<a href="#{}">{}</a>').format(question, title)
        found.append(Markup("{}: {}").format(link, first) if first else link)
    section.parts.extend([Notes(found), _lowest(results)])
    return section


def _lowest(results: Results) -> Table:
    """The setting with the lowest mean perplexity on each text."""
    lowest: dict[str, tuple[float, str]] = {}
    for name, row in spread_by_text(results.cells).items():
        for text, spread in row.items():
            lowest[text] = min(lowest.get(text, (spread.mean, name)), (spread.mean, name))
    dense = {row.text: row.perplexity for row in results.dense}
    rows: list[list[str | TableCell]] = [
        [text, perplexity(dense[text]) if text in dense else "", perplexity(value), name]
        for text, (value, name) in lowest.items()
    ]
    caption = "Lowest perplexity of a pruned model, mean over seeds"
    return Table(caption, ("text", "dense", "pruned", "setting"), "lrrl", rows)


def _summary(results: Results) -> str:
    dense = ", ".join(f"{row.text} {row.perplexity:.2f}" for row in results.dense[:_MAX_PANELS])
    settings = len({json.dumps(cell.setting, sort_keys=True) for cell, _ in results.cells})
    return (
        f"{count(settings, 'setting')}, each with {count(len(results.config.seeds), 'seed')}. "
        f"Perplexity of the dense model: {dense}."
    )


def _tiles(results: Results) -> list[tuple[str, str, str]]:
    spent = sum(record.seconds for _, record in results.cells)
    tokens = sum(row.n_tokens for row in results.dense)
    derived = sum(record.made == "derived" for _, record in results.cells)
    return [
        ("cells", f"{len(results.cells)}", f"settings times seeds; {derived} derived from stored updates"),
        ("seeds", f"{len(results.config.seeds)}", ", ".join(map(str, results.config.seeds))),
        ("measured on", f"{tokens:,}", "predicted tokens"),
        ("time", seconds(spent), "pruning and measuring"),
    ]


def _section(results: Results, question: str) -> Section:
    cells, known = results.of(question), QUESTIONS.get(question)
    section = Section(question, known.title if known else question)
    if known:
        section.parts.append(known.paper)
    section.parts.extend([Notes(sentences)] if (sentences := answers(results, question)) else [])
    spreads = spread_by_text(cells)
    different = cells[0][0].partition != "iid"
    if different:
        section.parts.append(_own_table(cells))
    section.parts.append(_table(cells, spreads))
    dense = {row.text: row.perplexity for row in results.dense}
    section.parts.extend(_figures(cells, spreads, dense))
    if question in ("methods", "domains"):
        section.parts.extend(_agreement(cells))
    return section


def _own_table(cells: Sequence[Measured]) -> Table:
    rows: list[list[str | TableCell]] = [
        [name, str(own), str(others)] for name, (own, others) in own_and_others(cells).items()
    ]
    caption = "Perplexity on held-out text, averaged over participants"
    return Table(caption, ("", "own text", "others' text"), "lrr", rows)


def _table(cells: Sequence[Measured], spreads: Mapping[str, Mapping[str, Spread]]) -> Table:
    texts, shares, made = texts_of(cells), tie_shares(cells), how_made(cells)
    names = names_of_settings([cell for cell, _ in cells])
    records = {names[cell.setting_key]: record for cell, record in cells}
    rows: list[list[str | TableCell]] = [
        [
            name,
            *(str(row[text]) if text in row else "" for text in texts),
            percent(shares[name]),
            _unwanted(records[name].pruned_by_votes),
            size(records[name].update_bytes) if records[name].update_bytes else "",
            made[name],
        ]
        for name, row in spreads.items()
    ]
    columns = ("", *texts, "by a tie", "against the majority", "each sends", "made by")
    return Table(
        "Perplexity, mean ± standard deviation over seeds",
        columns,
        "l" + "r" * (len(columns) - 2) + "l",
        rows,
    )


def _unwanted(by_votes: Sequence[int] | None) -> str:
    """Share of the prunes that fewer than half of the participants voted for."""
    if not by_votes or not sum(by_votes):
        return ""
    minority = sum(n for votes, n in enumerate(by_votes) if 2 * votes < len(by_votes) - 1)
    return percent(minority / sum(by_votes))


def _figures(
    cells: Sequence[Measured], spreads: Mapping[str, Mapping[str, Spread]], dense: Mapping[str, float]
) -> list[Part]:
    texts = texts_of(cells)
    if len(texts) > _MAX_PANELS:
        return []
    varying = [axis for axis in _NUMBERS if len({cell.setting[axis] for cell, _ in cells}) > 2]
    label = f"Perplexity. {plots.describe(spreads)}."
    if not varying:
        panels = {text: {name: row[text] for name, row in spreads.items()} for text in texts}
        caption = f"Each dot is a seed, and each bar is the mean. {_DASHED}"
        return [Plot(draw(plots.dots, panels, dense, label), caption)]
    axis = varying[0]
    methods: dict[str, list[Measured]] = {}
    stripped = [_without(cell, axis) for cell, _ in cells]
    for cell, record in cells:
        methods.setdefault(name_of(_without(cell, axis), stripped), []).append((cell, record))
    panels_by_number: dict[str, dict[str, dict[float, Spread]]] = {text: {} for text in texts}
    for name, some in methods.items():
        numbers = sorted({cell.setting[axis] for cell, _ in some})
        for number in numbers:
            at = spread_by_text([one for one in some if one[0].setting[axis] == number])
            for text, spread in next(iter(at.values())).items():
                panels_by_number[text].setdefault(name, {})[number] = spread
    figure = draw(plots.curves, panels_by_number, dense, label, _NAMES[axis], doubling=_NUMBERS[axis])
    return [
        Plot(
            figure,
            f"Mean and standard deviation over seeds. {_DASHED}",
        )
    ]


def _without(cell: Cell, axis: str) -> Cell:
    """The cell with an axis reset to a constant."""
    if axis == "participants":
        return replace(cell, participants=0)
    plain = type(cell.config).model_fields[axis].default
    return replace(cell, config=cell.config.model_copy(update={axis: plain}))


def _agreement(cells: Sequence[Measured]) -> list[Part]:
    """Pairwise agreement of the masks, for the setting with the most participants and its first seed."""
    shared = [(cell, record) for cell, record in cells if record.agreement]
    if not shared:
        return []
    cell, record = max(shared, key=lambda one: (one[0].participants, -one[0].config.seed))
    matrix = record.agreement
    if matrix is None or len(matrix) < 2:
        return []
    names = record.participants
    values = np.array(matrix)
    np.fill_diagonal(values, np.nan)
    label = (
        f"Pairwise agreement of masks at sparsity {cell.config.sparsity:g}, mean {np.nanmean(values):.4f}."
    )
    figure = draw(
        report_plots.heatmap,
        values,
        names,
        names,
        label,
        limits=plots.agreement_limits(matrix),
        names=("", "", "agreement"),
    )
    caption = f"{label} Share of weights that both prune or both keep ({cell.label or 'default settings'})."
    return [Plot(figure, caption)]


def _setting(results: Results) -> Section:
    section = Section("setting", "Settings")
    section.parts.append(
        "Cells made by a run were pruned from the start; derived cells were decided from the participants' "
        "stored updates, which gives the same weights. Every perplexity was measured by forward passes "
        "through the pruned model."
    )
    section.parts.extend(options(results.config))
    model = results.model
    about = [["prunable weights", f"{model.n_prunable:,}"]]
    section.parts.extend(model_and_versions(model.source, model.fingerprint, about, results.versions))
    return section
