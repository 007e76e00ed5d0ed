"""How a run was made: options, model and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedprllm.report.facts import Facts
from fedprllm.report.layout import Cell, Fold, Part, Section, Table
from fedprllm.report.words import count, percent
from fedprllm.settings import Settings

__all__ = ["model_and_versions", "options", "setting"]


def setting(facts: Facts) -> Section:
    """Options, model and versions."""
    record = facts.record
    about = [["prunable weights", f"{record.n_prunable:,} in {count(len(facts.blocks), 'block')}"]]
    about += _coverage(facts)
    software = model_and_versions(record.model.source, record.model.fingerprint, about, record.versions)
    return Section("setting", "Settings", [*options(facts.config), *software, *_prints(facts)])


def options(config: Settings) -> list[Part]:
    """The options that are not at their default; all of them folded."""
    values = config.model_dump(mode="json")
    # A required option has no default that its value could be equal to.
    plain = {name: _word(field.default) for name, field in type(config).model_fields.items()}
    with_default = {
        name
        for name, field in type(config).model_fields.items()
        if not field.is_required() and field.default is not None
    }
    given = {name: _word(value) for name, value in values.items()}
    meanings = {name: field.description or "" for name, field in type(config).model_fields.items()}
    changed: list[list[str | Cell]] = [
        [
            name.replace("_", "-"),
            Cell(word, f"default: {plain[name]}" if name in with_default else ""),
            meanings[name],
        ]
        for name, word in given.items()
        if word != plain[name]
    ]
    every: list[list[str | Cell]] = [
        [name.replace("_", "-"), word, meanings[name]] for name, word in given.items()
    ]
    first: Part = "All options have their defaults."
    if changed:
        columns = ("option", "value", "meaning")
        first = Table("Options that are not at their default", columns, "lll", changed)
    all_of_them = Table("All options", ("option", "value", "meaning"), "lll", every)
    return [first, Fold(f"All {len(every)} options", [all_of_them])]


def model_and_versions(
    source: str, fingerprint: str, about: list[list[str]], versions: Mapping[str, str]
) -> list[Part]:
    """The model and the software, folded.

    Args:
        source: The model as the user named it.
        fingerprint: SHA-256 of its weights.
        about: Further rows about the model.
        versions: Version by software.
    """
    rows: list[list[str | Cell]] = [
        ["model", source],
        ["fingerprint", f"{fingerprint} (SHA-256 of its weights)"],
        *(list[str | Cell](row) for row in about),
        *(list[str | Cell]([name, number]) for name, number in versions.items()),
    ]
    return [Fold("Model and versions", [Table("Model and versions", ("", ""), "lp", rows)])]


def _coverage(facts: Facts) -> list[list[str]]:
    """How much of the blocks can be pruned; nothing in records of earlier versions."""
    share = facts.record.coverage
    if share is None:
        return []
    lowest = min((record.coverage for record in facts.blocks if record.coverage is not None), default=share)
    each = "" if lowest == share else f", at least {percent(lowest)} of every block"
    return [["coverage", f"{percent(share)} of the blocks' weight matrices are prunable{each}"]]


def _prints(facts: Facts) -> list[Part]:
    """Digests of the participants' windows, where they are known."""
    known = {name: one.fingerprint for name, one in facts.participants.items() if one.fingerprint}
    rows: list[list[str | Cell]] = [[name, digest] for name, digest in known.items()]
    if facts.record.run_id is not None:
        rows.insert(0, ["run id", facts.record.run_id])
    if not rows:
        return []
    return [
        Fold("Identity of the run", [Table("SHA-256 of each participant's windows", ("", ""), "lp", rows)])
    ]


def _word(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, (list, tuple)):
        return ", ".join(one if isinstance(one, str) else json.dumps(one) for one in value) or "none"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
