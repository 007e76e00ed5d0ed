"""Prunes that a tie rule decided."""

from __future__ import annotations

from collections import defaultdict

from fedprllm.report.facts import Facts
from fedprllm.report.layout import Cell, Section, Table, numbered
from fedprllm.report.words import count, percent

__all__ = ["ties"]


def ties(facts: Facts) -> Section:
    """How many prunes a tie rule decided, for the server and for each participant."""
    rule = f"Ties between equal scores or votes are broken by this run's rule: {facts.config.ties}."
    if facts.config.vote_ties != facts.config.ties:
        rule += f" For equal votes, the rule is {facts.config.vote_ties}."
    section = Section("ties", "Prunes decided by a tie", [rule])
    if facts.strategy.server_votes:
        rows = [_tie_row(facts, one, one) for one in facts.types]
        rows.append(_tie_row(facts, "all Linears", None))
        columns = ("type of Linear", "prunes", "decided by a tie", "share of prunes")
        strong = frozenset({len(rows) - 1})
        section.parts.append(Table("The server's decision", columns, "lrrr", rows, strong))
    close = [linear.n_close for _, linear in facts.linears() if linear.n_close is not None]
    if close:
        section.parts.append(
            f"For {count(sum(close), 'prune')}, the score is so close to that of a kept weight that float "
            "rounding may have decided: pooled text could give a different mask there."
        )
    own: dict[str, int] = defaultdict(int)
    for record in facts.blocks:
        for name, n_ties in record.participant_ties.items():
            own[name] += n_ties
    n_pruned = facts.total("n_pruned")
    if not own:
        return section
    if not any(own.values()):
        whose = "the mask of the pooled text" if facts.strategy.pools_text else "the participants' own masks"
        section.parts.append(f"No prune in {whose} was decided by a tie.")
        return section
    own_rows: list[list[str | Cell]] = [[name, f"{n:,}", percent(n / n_pruned)] for name, n in own.items()]
    heads = ("participant", "decided by a tie", "share of prunes")
    section.parts.append(Table("The participants' own masks", heads, "lrr", numbered(own_rows)))
    return section


def _tie_row(facts: Facts, name: str, of_type: str | None) -> list[str | Cell]:
    n_pruned, n_ties = facts.total("n_pruned", of_type), facts.total("n_ties", of_type)
    share = n_ties / n_pruned if n_pruned else 0.0
    return [name, f"{n_pruned:,}", f"{n_ties:,}", percent(share)]
