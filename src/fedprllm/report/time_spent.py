"""Where the time of a run went."""

from __future__ import annotations

from fedprllm.report import plots
from fedprllm.report.drawing import draw
from fedprllm.report.facts import Facts
from fedprllm.report.layout import Plot, Section
from fedprllm.report.words import count, percent, seconds

__all__ = ["time"]

_PHASES = {
    "read": "load the block",
    "observe": "forward passes that collect statistics",
    "select": "rank the weights and make each participant's mask",
    "vote": "count votes and sample the agreement",
    "advance": "forward passes through the pruned block",
    "aggregate": "the server's decision",
    "write": "store the pruned block",
    "record": "count zeros and store the votes",
}


def time(facts: Facts) -> Section:
    """Time per phase, summed over blocks."""
    recorded = {phase for record in facts.blocks for phase in record.seconds}
    spent = dict.fromkeys((phase for phase in _PHASES if phase in recorded), 0.0)
    for record in facts.blocks:
        for phase, value in record.seconds.items():
            spent[phase] = spent.get(phase, 0.0) + value
    total = sum(spent.values())
    texts = [f"{seconds(value)}  ({percent(value / total)})" for value in spent.values()]
    label = "Seconds by phase. " + ", ".join(
        f"{phase} {text}" for phase, text in zip(spent, texts, strict=True)
    )
    meaning = "; ".join(f"{phase}: {_PHASES[phase]}" for phase in spent if phase in _PHASES)
    n = len(facts.voting)
    whose = f"for {n} participants in turn" if n > 1 else "for one participant"
    if facts.strategy.pools_text:
        whose = "for the pooled text"
    if facts.networked:
        whose = "by the coordinator; the participants' own time is not recorded here"
    return Section(
        "time",
        "Time",
        [
            f"{seconds(total)} for {count(len(facts.blocks), 'block')} on {facts.config.device} in "
            f"{facts.config.dtype}, {whose}. Reading the text and evaluating are not included.",
            Plot(
                draw(plots.bars, spent, texts, label),
                f"Time by phase, summed over blocks. {meaning}.",
            ),
        ],
    )
