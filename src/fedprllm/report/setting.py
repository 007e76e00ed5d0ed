"""The settings of a run: configuration, participants, model and versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedprllm.config import PruneConfig
from fedprllm.report.facts import Cell, Facts, Plot, Section, Table, count, numbered, percent

__all__ = ["setting"]


def setting(facts: Facts) -> Section:
    """Configuration, participants, model and versions."""
    section = Section("setting", "Settings")
    options: list[list[str | Cell]] = []
    for name, value in facts.config.model_dump(mode="json").items():
        option = PruneConfig.model_fields[name]
        changed = option.default is not None and value != option.default
        note = f"default: {_word(option.default)}" if changed else ""
        options.append([name.replace("_", "-"), Cell(_word(value), note), option.description or ""])
    section.parts.append(Table("Configuration", ("option", "value", "meaning"), "lll", options))
    section.parts.extend(_participants(facts))
    record = facts.record
    software: list[list[str | Cell]] = [
        ["model", record.model.source],
        ["fingerprint", f"{record.model.fingerprint[:12]}… (SHA-256 of its weights, shortened)"],
        ["prunable weights", f"{record.n_prunable:,} in {count(len(facts.blocks), 'block')}"],
        *_coverage(facts),
        *[list[str | Cell]([name, number]) for name, number in record.versions.items()],
    ]
    section.parts.append(Table("Model and versions", ("", ""), "lp", software))
    return section


def _coverage(facts: Facts) -> list[list[str | Cell]]:
    """How much of the blocks can be pruned; nothing in records of earlier versions."""
    share = facts.record.coverage
    if share is None:
        return []
    lowest = min((record.coverage for record in facts.blocks if record.coverage is not None), default=share)
    each = "" if lowest == share else f", at least {percent(lowest)} of every block"
    return [["coverage", f"{percent(share)} of the blocks' weight matrices are prunable{each}"]]


def _participants(facts: Facts) -> list[str | Table | Plot]:
    """The participants; a text that was split among all of them is named once."""
    texts = [one.sources for one in facts.participants.values()]
    one_text = len(texts) > 1 and all(sources == texts[0] for sources in texts)
    rows: list[list[str | Cell]] = [
        [
            name,
            *([] if one_text else [_sources(one.sources)]),
            "in the sum only" if one.n_windows is None else f"{one.n_windows:,}",
            f"{one.window_length:,}",
            "in the sum only" if one.n_windows is None else f"{one.n_tokens:,}",
        ]
        for name, one in facts.participants.items()
    ]
    columns = ("participant", "text", "windows", "tokens each", "tokens")
    caption = "Participants and their calibration text"
    if not one_text:
        return [Table(caption, columns, "lprrr", numbered(rows))]
    kept = (columns[0], *columns[2:])
    return [
        Table(caption, kept, "lrrr", numbered(rows)),
        f"All participants' text comes from {_sources(texts[0])}.",
    ]


def _word(value: Any) -> str:
    if value is None:
        return "not set"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _sources(sources: Sequence[str]) -> str:
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    return ", ".join(sources[:3]) + more
