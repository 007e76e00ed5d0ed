"""The page about a healing: what it did to the loss, round by round."""

from __future__ import annotations

import math
from pathlib import Path

from fedprllm.healing.in_process import HealResult
from fedprllm.healing.records import HealRecord
from fedprllm.report import plots
from fedprllm.report.facts import (
    Cell,
    Page,
    Plot,
    Section,
    Table,
    change,
    count,
    mean_perplexity,
    perplexity,
    seconds,
    size,
)

__all__ = ["healing_page"]


def healing_page(result: HealResult) -> Page:
    """The page about a complete healing."""
    record = result.record
    sections = [_curve(record), _perplexities(record), _participants(record), _setting(record)]
    return Page(
        f"{_name(record)}: healing report",
        _summary(record),
        _tiles(record),
        [section for section in sections if section is not None],
    )


def _name(record: HealRecord) -> str:
    """A hub id as it is; of a path only what names the run and the model."""
    path = Path(record.model.source)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _summary(record: HealRecord) -> str:
    n = len(record.participants)
    text = (
        f"{record.n_parameters:,} of {record.n_model_parameters:,} parameters of {_name(record)} (norms, "
        f"biases and one scale for each row of a Linear) were trained by {count(n, 'participant')} in "
        f"{count(record.config.rounds, 'round')}."
    )
    measured = dict(record.held_out)
    if measured:
        text += (
            f" Loss on held-out windows: {measured[0]:.4f} before, {measured[record.best_round]:.4f} with "
            f"the parameters of the result, those of round {record.best_round}."
        )
    return " ".join([text, *(f"{note[0].upper()}{note[1:]}." for note in record.notes)])


def _tiles(record: HealRecord) -> list[tuple[str, str, str]]:
    tiles = [
        (
            "participants",
            f"{len(record.participants)}",
            "under masks" if record.config.secure else "in the clear",
        ),
        ("each sends", size(record.update_bytes), f"in each of {count(len(record.rounds), 'round')}"),
    ]
    if record.evaluation:
        before, healed = (mean_perplexity(record.evaluation[name]) for name in ("before", "healed"))
        value = f"{perplexity(before)} → {perplexity(healed)}"
        tiles.append(("perplexity", value, change(healed, before)))
    tiles.append(("time", seconds(sum(one.seconds for one in record.rounds)), "for all rounds"))
    return tiles


def _curve(record: HealRecord) -> Section:
    nan = math.nan
    series = {
        "training text": [nan if one.loss is None else one.loss for one in record.rounds],
        "held-out text": [nan if one.held_out_loss is None else one.held_out_loss for one in record.rounds],
    }
    series = {name: values for name, values in series.items() if not all(map(math.isnan, values))}
    held_out = record.held_out
    before = held_out[0][1] if held_out else series["training text"][0]
    caption = (
        "Mean loss per token in nats, with the parameters that a round began with; lower is better. The "
        "windows of training text differ from round to round; those of held-out text are the same."
    )
    label = f"Loss by round: {before:.3f} in round 0."
    if held_out:
        label = (
            f"Loss by round: on held-out text {before:.3f} in round 0 and {held_out[-1][1]:.3f} at the end."
        )
    svg = plots.lines(series, label, ("round", "loss in nats"), (before, "before"), bridged=True)
    rows: list[list[str | Cell]] = [
        [
            str(one.number),
            "" if one.loss is None else f"{one.loss:.4f}",
            "" if one.held_out_loss is None else f"{one.held_out_loss:.4f}",
            f"{one.learning_rate:.2g}",
            "taken back" if one.taken_back else "",
        ]
        for one in record.rounds
    ]
    names = ("round", "training text", "held-out text", "largest step", "")
    table = Table("Every round", names, "rrrrl", rows)
    return Section("loss", "Loss by round", [Plot(svg, caption), table])


def _perplexities(record: HealRecord) -> Section | None:
    if not record.evaluation:
        return None
    rows: list[list[str | Cell]] = [
        [
            before.text,
            perplexity(before.perplexity),
            Cell(perplexity(healed.perplexity), change(healed.perplexity, before.perplexity)),
        ]
        for before, healed in zip(record.evaluation["before"], record.evaluation["healed"], strict=True)
    ]
    table = Table("Perplexity by text", ("text", "before", "healed"), "lrr", rows)
    note = (
        "Lower is better. Part of a gain is that the model knows the participants' text better: heal the "
        "dense model too, and compare."
    )
    return Section("perplexity", "Perplexity", [note, table])


def _participants(record: HealRecord) -> Section:
    last = next((one.losses for one in reversed(record.rounds) if one.losses), {})
    first = next((one.losses for one in record.rounds if one.losses), {})
    rows: list[list[str | Cell]] = [
        [
            name,
            "kept private" if one.n_windows is None else str(one.n_windows),
            f"{first[name]:.3f}" if name in first else "in the sum only",
            f"{last[name]:.3f}" if name in last else "",
        ]
        for name, one in record.participants.items()
    ]
    names = ("participant", "windows", "loss in its first round", "in its last")
    return Section("participants", "Participants", [Table("Participants", names, "lrrr", rows)])


def _setting(record: HealRecord) -> Section:
    options = record.config.model_dump(mode="json", exclude_defaults=True)
    rows: list[list[str | Cell]] = [[name.replace("_", "-"), str(value)] for name, value in options.items()]
    parts: list[str | Table | Plot] = ["All options have their defaults."]
    if rows:
        parts = [Table("Options that are not at their default", ("option", "value"), "ll", rows)]
    return Section("setting", "Setting", parts)
