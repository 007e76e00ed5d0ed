"""The page about a run that prunes: the answers first, then the evidence, then how it was made."""

from __future__ import annotations

from pathlib import Path

from fedprllm.api import PruneResult
from fedprllm.pruning.records import Reduction
from fedprllm.report.agreement import agreement
from fedprllm.report.cautions import cautions
from fedprllm.report.facts import Facts
from fedprllm.report.layout import Page
from fedprllm.report.obtained import files_tile, obtained
from fedprllm.report.payoff import headline, payoff, quoted, texts_of
from fedprllm.report.perplexity import perplexities
from fedprllm.report.removed import removed
from fedprllm.report.setting import setting
from fedprllm.report.shared import shared
from fedprllm.report.sparsity import zeros
from fedprllm.report.ties import ties
from fedprllm.report.time_spent import time
from fedprllm.report.words import count, percent, size_range

__all__ = ["pruning_page"]


def pruning_page(result: PruneResult, run: Path) -> Page:
    """The page about a complete run.

    Args:
        result: The run.
        run: Its folder.
    """
    facts = Facts(result)
    single = (zeros(facts), agreement(facts), ties(facts)) if facts.prunes_weights else ()
    evidence = (perplexities(facts), removed(facts), *single, time(facts))
    return Page(
        "report of a federation" if facts.networked else "pruning report",
        facts.model,
        _summary(facts),
        _tiles(facts),
        [obtained(facts), payoff(facts), shared(facts), cautions(facts, run)],
        [section for section in evidence if section is not None],
        [setting(facts)],
    )


def _summary(facts: Facts) -> str:
    participants = count(len(facts.participants), "participant")
    how = (
        f"on the pooled text of {participants}"
        if facts.strategy.pools_text
        else f"by {participants}, {facts.config.strategy}"
        if facts.strategy.server_votes
        else f"by {participants}, each alone"
    )
    what = facts.record.outcome.replace("%", "\N{NO-BREAK SPACE}%")
    return f"{what[0].upper()}{what[1:]} {how}. {headline(facts, texts_of(facts))}".strip()


def _smaller(found: Reduction | None) -> list[tuple[str, str, str]]:
    """How much smaller the model became; nothing if it lost no whole parts."""
    if found is None:
        return []
    note = f"of all {found.n_parameters[0]:,}, {percent(found.of_blocks)} of the blocks'"
    return [("fewer parameters", percent(found.of_model), note)]


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """Key figures, each with its name, value and note."""
    tiles = _smaller(facts.record.reduction)
    if facts.record.reduction is None or facts.record.n_zeros:
        note = f"of {facts.record.n_prunable:,} prunable weights"
        tiles.append(("zeros", percent(facts.sparsity), note))
    found = quoted(facts)
    if found:
        tiles.append(("perplexity", f"{found[0]} → {found[1]}", found[2]))
    tiles.extend(files_tile(facts))
    sent = facts.sent.values()
    if any(sent):
        each = "each sent" if facts.networked else "each would send"
        tiles.append((each, size_range(sent), f"in {count(facts.record.rounds, 'round')}"))
    tiles.append(("participants", f"{len(facts.participants)}", facts.config.strategy))
    return tiles
