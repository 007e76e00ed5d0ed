"""What a user of the result should be careful about, from what the run recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fedprllm.report.facts import Facts
from fedprllm.report.layout import Notes, Section
from fedprllm.report.words import count, listed, percent

__all__ = ["cautions", "left_out", "sentence"]

_MANY_TIES = 0.05  # share of the prunes from which on it is said
_FEW_TOKENS = 5_000  # of held-out text; the perplexity on fewer says little about small differences
_ALWAYS = (
    "Pruning changes what a model does, and not evenly: what it rarely had to do suffers most. Before you "
    "use it, check what matters to you, for instance bias, refusals and languages other than those of the "
    "text."
)
_FINE_TUNING = "Fine-tuning the model as usual fills its zeros again."


def cautions(facts: Facts, run: Path) -> Section:
    """Participants that left, deviations from what was asked for, and figures that rest on little text.

    Args:
        facts: The run.
        run: Its folder.
    """
    notes = [
        *_gone(facts, left_out(run)),
        *map(sentence, facts.record.notes or ()),
        *map(sentence, facts.record.deviations()),
        *_ties(facts),
        *_little_text(facts),
        _ALWAYS,
        *([_FINE_TUNING] if facts.record.n_zeros else []),
    ]
    return Section("cautions", "What to be careful about", [Notes(notes)])


def sentence(words: str) -> str:
    """Words as a sentence: they begin with a capital, unless with a name, and end with a period."""
    words = words if words.endswith((".", "!", "?")) else f"{words}."
    return words[0].upper() + words[1:] if words[:2].islower() or words[1:2] == " " else words


def left_out(run: Path) -> dict[str, str]:
    """Participants that a federation left out, each with the last reason; empty if there were none.

    Args:
        run: Folder of the run.
    """
    path = run / "federation" / "events.jsonl"
    if not path.is_file():
        return {}
    events = [_event(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return {
        str(event["participant"]): str(event.get("reason", "unknown"))
        for event in events
        if event.get("event") == "left out" and "participant" in event
    }


def _event(line: str) -> dict[str, Any]:
    """A line of the events; empty if a crash cut it short."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _gone(facts: Facts, reasons: dict[str, str]) -> list[str]:
    """Participants that did not take part to the end, with the reason if it is known."""
    whole = len(facts.blocks)
    shared = {name: facts.participants[name].n_blocks or 0 for name in reasons if name in facts.participants}
    sentences = [
        f"{name} was left out ({reason}){_what_counts(shared.get(name, 0), whole)}"
        for name, reason in reasons.items()
    ]
    if any(shared.get(name, 0) < whole for name in reasons):
        sentences.append("Blocks without a participant's updates rest on the others' text alone.")
    elif not reasons and facts.dropouts and facts.config.block_fraction == "1":
        sentences.append("Some blocks rest on fewer participants, because not all took part to the end.")
    return sentences


def _what_counts(n_blocks: int, whole: int) -> str:
    if not n_blocks:
        return "; nothing of it is in the model."
    of = "all blocks" if n_blocks == whole else f"{n_blocks:,} of {count(whole, 'block')}"
    return f"; its updates of {of} count."


def _ties(facts: Facts) -> list[str]:
    n_pruned, n_ties = facts.total("n_pruned"), facts.total("n_ties")
    if not facts.strategy.server_votes or not n_pruned or n_ties / n_pruned < _MANY_TIES:
        return []
    return [
        f"{percent(n_ties / n_pruned)} of the prunes were decided by the rule for ties "
        f"({facts.config.vote_ties}), not by the participants."
    ]


def _little_text(facts: Facts) -> list[str]:
    """Texts with so few predicted tokens that small differences may be chance."""
    n_tokens = {row.text: row.n_tokens for rows in facts.measured.values() for row in rows}
    few = {text: n for text, n in n_tokens.items() if n < _FEW_TOKENS}
    if not few:
        return []
    least = min(few.values())
    some = math.isclose(least, max(few.values()), rel_tol=0.01)
    tokens = f"{least:,}" if some else f"{least:,} to {max(few.values()):,}"
    return [
        f"The perplexity on {listed(list(few))} was measured on {tokens} tokens: differences of a few "
        "percent may be chance."
    ]
