"""What left each participant: kinds of data, bytes, and who saw them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedprllm.report.facts import Facts
from fedprllm.report.layout import Cell, Part, Section, Table, Verdict, numbered
from fedprllm.report.words import count, size_range
from fedprllm.sharing import SHARING

__all__ = ["shared"]

_SURVEYED = "before that, for OWL, each block's number of outliers or the sums to count them"

_TELLS = "Whatever is computed from a text tells something about it: docs/security.md says what is promised."


def shared(facts: Facts) -> Section:
    """What left each participant or, in one process, would leave it."""
    section = Section("shared", f"What {'left' if facts.networked else 'would leave'} each participant")
    if not any(facts.sent.values()):
        why = (
            "the text itself was pooled, all of it in one place"
            if facts.strategy.pools_text
            else "each participant pruned alone"
        )
        section.parts.extend([Verdict(f"No updates: {why}."), *_participants(facts)])
        return section
    section.parts.append(Verdict(_answer(facts)))
    section.parts.append(Table("What leaves a participant, and who sees it", ("", ""), "ll", _rows(facts)))
    section.parts.append(_TELLS)
    section.parts.extend(_participants(facts))
    section.parts.append(
        "Measured on the updates that the coordinator received; if they differ, the largest counts."
        if facts.networked
        else "This run took place in one process, so nothing left the machine; over a network, framing and "
        "checksums are added."
    )
    return section


def _answer(facts: Facts) -> str:
    verb = "sent" if facts.networked else "would send"
    noun, sent = SHARING[facts.config.share].noun, size_range(facts.sent.values())
    seen = (
        "The server sees only sums over participants."
        if facts.config.secure
        else "The server sees each participant's updates one by one; the other participants do not."
    )
    return f"Each participant {verb} {sent}: {noun}, no text. {seen}"


def _rows(facts: Facts) -> list[list[str | Cell]]:
    config, per_block = facts.config, facts.record.update_bytes_per_block
    kinds = SHARING[config.share].content
    if config.secure:
        kinds += " Under masks, random numbers hide every value, which takes more bytes."
    survey = sum(facts.record.survey_bytes_per_block)
    if survey:
        kinds = f"{kinds.removesuffix('.')}; {_SURVEYED}."
    rows: list[list[str | Cell]] = [
        ["kinds", kinds],
        ["with each update", _besides(facts)],
        ["per block", _exact(per_block)],
        ["in total", _exact(facts.sent.values())],
        ["rounds", f"{facts.record.rounds:,}: {_rounds(facts)}"],
        ["seen by the server", _seen(facts)],
        ["seen by the others", "the server's decision and the model card"],
    ]
    if survey:
        rows.insert(2, ["before pruning, to find outliers", _exact([survey])])
    if facts.networked and facts.evaluation:
        reported = "two perplexities, with their number of tokens, of those that named held-out text"
        rows.append(["after the run", reported])
    return rows


def _exact(numbers: Iterable[int]) -> str:
    """A number of bytes, exactly and, if it is large, in a suitable unit."""
    low, high = min(numbers := list(numbers)), max(numbers)
    exact = f"{low:,} bytes" if low == high else f"{low:,} to {high:,} bytes"
    return f"{exact} ({size_range(numbers)})" if high >= 1000 else exact


def _besides(facts: Facts) -> str:
    tokens = "the number of calibration tokens" + (", in the sum only" if facts.config.secure else "")
    return f"names of the participant and the run, the model's fingerprint, the block's number, {tokens}"


def _rounds(facts: Facts) -> str:
    return (
        "after each block the server returns its decision, and all participants continue from it"
        if facts.strategy.follows_server
        else "each participant goes through all blocks on its own and sends all updates at the end"
    )


def _least_in_a_sum(facts: Facts) -> int:
    """The smallest number of participants in a sum that the server saw."""
    return min(len(facts.voters(record)) for record in facts.blocks)


def _seen(facts: Facts) -> str:
    if not facts.config.secure:
        return "every participant's updates, one by one"
    return f"only sums, added up under masks, over at least {count(_least_in_a_sum(facts), 'participant')}"


def _participants(facts: Facts) -> list[Part]:
    """The participants, with their text as far as it is known and what they shared."""
    texts = [one.sources for one in facts.participants.values()]
    one_text = len(texts) > 1 and all(named == texts[0] for named in texts)
    n_blocks = len(facts.blocks)
    sends = any(facts.sent.values())
    rows: list[list[str | Cell]] = []
    for name, one in facts.participants.items():
        hidden = one.n_windows is None
        rows.append(
            [
                name,
                *([] if one_text or facts.networked else [_sources(one.sources)]),
                "in the sum only" if hidden else f"{one.n_windows:,}",
                f"{one.window_length:,}",
                "in the sum only" if hidden else f"{one.n_tokens:,}",
                *([f"{one.n_blocks or 0:,} of {n_blocks:,}", f"{one.update_bytes or 0:,}"] if sends else []),
            ]
        )
    text = () if one_text or facts.networked else ("text",)
    columns = (
        "participant",
        *text,
        "windows",
        "tokens each",
        "tokens",
        *(("blocks", "bytes") if sends else ()),
    )
    align = "l" + "p" * len(text) + "r" * (len(columns) - 1 - len(text))
    parts: list[Part] = [Table("Participants and their calibration text", columns, align, numbered(rows))]
    if facts.networked:
        parts.append("Where a participant's text came from is known to the participant alone.")
    elif one_text:
        parts.append(f"All participants' text comes from {_sources(texts[0])}.")
    return parts


def _sources(names: Sequence[str]) -> str:
    """Where text came from, shortened."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
