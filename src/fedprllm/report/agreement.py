"""How much the participants' masks agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb

import numpy as np

from fedprllm.pruning.records import BlockRecord, type_of
from fedprllm.report import plots
from fedprllm.report.drawing import draw
from fedprllm.report.facts import Facts
from fedprllm.report.layout import Part, Plot, Section, Table
from fedprllm.report.words import count, percent

__all__ = ["agreement", "mean_agreement"]

# Sample size of `fedprllm.pruning.agreement` for each Linear.
SAMPLE = 16_384


def agreement(facts: Facts) -> Section:
    """How much the participants' masks agree: votes and pairs of participants."""
    section = Section("agreement", "How much the participants agree")
    if len(facts.voting) < 2:
        why = "all text was pooled" if facts.strategy.pools_text else "there is only one participant"
        section.parts.append(f"Omitted: {why}, so there is only one mask.")
        return section
    if facts.blocks[0].agreement:
        section.parts.extend([*_votes(facts), *_pairs(facts)])
    elif facts.config.secure and facts.has_votes:
        section.parts.extend([*_votes(facts), *_mean_of_pairs(facts)])
    else:
        section.parts.append(
            "Omitted: votes were weighted by tokens under masks, so only their sums are known."
            if facts.config.secure and facts.config.share in ("mask", "weights")
            else "Omitted: the participants share sums and make no masks of their own."
        )
    return section


def _votes(facts: Facts) -> list[Part]:
    n = len(facts.voting)
    own = facts.pruned_share
    if not facts.has_votes:
        return ["There is no histogram of votes: this run did not count them individually."]
    histograms = {one: facts.votes(one) for one in facts.types}
    rows = {"all Linears": facts.votes(), **histograms}
    shares = {path: list(counts / counts.sum()) for path, counts in rows.items()}
    shares["random masks"] = [comb(n, v) * own**v * (1 - own) ** (n - v) for v in range(n + 1)]
    alike = shares["all Linears"][0] + shares["all Linears"][n]
    by_chance = shares["random masks"][0] + shares["random masks"][n]
    lead = (
        f"Of all weights, {percent(shares['all Linears'][n])} would be pruned by every participant and "
        f"{percent(shares['all Linears'][0])} by none; the participants disagree on the other "
        f"{percent(1 - alike)} ({percent(1 - by_chance)} if masks were random)."
    )
    if facts.dropouts:
        lead += " Some blocks received fewer votes because not all participants took part in them."
    if not facts.strategy.server_votes:
        lead += " This run held no vote: the masks were counted only for this report."
    label = "Share of weights by number of votes. " + "; ".join(
        f"{path}: none {percent(parts[0])}, all {percent(parts[-1])}" for path, parts in shares.items()
    )
    figure = draw(plots.shares, shares, label, f"votes to prune, of {n} participants")
    caption = "Share of weights by number of participants that would prune them, by type of Linear."
    return [lead, Plot(figure, caption, _table_of_votes(shares))]


def _table_of_votes(shares: Mapping[str, Sequence[float]]) -> Table:
    n = max(map(len, shares.values()))
    rows = [[name, *map(percent, parts)] for name, parts in shares.items()]
    columns = ("", *(count(votes, "vote") for votes in range(n)))
    return Table("Share of weights by number of votes", columns, "l" + "r" * n, rows)


def _pairs(facts: Facts) -> list[Part]:
    matrix, lines = _mean_agreement(facts)
    names = facts.voting[: len(matrix)]
    chance = facts.pruned_share**2 + (1 - facts.pruned_share) ** 2
    pairs = sorted(
        (matrix[a, b], names[a], names[b])
        for a, b in combinations(range(len(names)), 2)
        if np.isfinite(matrix[a, b])
    )
    if not pairs:
        return ["No two participants took part in the same block, so there are no pairs to compare."]
    sampled = f"estimated from a sample of {SAMPLE:,} weights per Linear"
    if pairs[0][0] == 1:
        return [f"All masks are identical ({sampled})."]
    mean = sum(pair[0] for pair in pairs) / len(pairs)
    lead = f"On average, two participants agree on {percent(mean)} of the weights"
    if len(pairs) > 1:
        (low, *least), (high, *most) = pairs[0], pairs[-1]
        lead += (
            f"; {' and '.join(least)} agree least ({percent(low)}), {' and '.join(most)} most "
            f"({percent(high)})"
        )
    np.fill_diagonal(matrix, np.nan)
    limits = (float(np.floor(pairs[0][0] * 50) / 50), float(np.ceil(pairs[-1][0] * 50) / 50))
    reference = (
        f"two random masks at sparsity s = {facts.pruned_share:.3g} agree on s² + (1 - s)² = {chance:.3f}"
    )
    first = " Participants are numbered as in their table." if len(names) > plots.MAX_NAMED else ""
    if len(names) < len(facts.voting):
        first += f" Only the first {len(names)} are shown."
    heatmap = draw(
        plots.heatmap,
        matrix,
        names,
        names,
        f"Heatmap of the pairwise agreement of masks. {lead}.",
        limits=limits,
        names=("", "", "agreement"),
    )
    label = "Mean pairwise agreement by block and type of Linear. Means over blocks: " + ", ".join(
        f"{path} {np.nanmean(values):.3f}" for path, values in lines.items()
    )
    axes = ("block", "mean pairwise agreement")
    curves = draw(plots.lines, lines, label, axes, (chance, "random masks"))
    listed = None
    if len(names) <= plots.MAX_NAMED:
        rows = [[f"{one} and {other}", f"{value:.3f}"] for value, one, other in reversed(pairs)]
        listed = Table("Agreement of two participants", ("participants", "agreement"), "lr", rows)
    return [
        f"{lead}.",
        Plot(
            heatmap,
            f"Pairwise agreement of the masks: share of weights that both prune or both keep, averaged over "
            f"all Linears weighted by their size, {sampled}. For reference: {reference}.{first}",
            listed,
        ),
        Plot(
            curves,
            f"The same, averaged over all pairs, by block and type of Linear ({sampled}).",
            _table_of_blocks(facts, lines),
        ),
    ]


def _table_of_blocks(facts: Facts, lines: Mapping[str, Sequence[float]]) -> Table:
    """Mean agreement by block and type of Linear."""
    rows = [
        [str(record.block), *("" if np.isnan(value) else f"{value:.3f}" for value in values)]
        for record, *values in zip(facts.blocks, *lines.values(), strict=True)
    ]
    return Table("Mean agreement", ("block", *lines), "l" + "r" * len(lines), rows)


def _mean_of_pairs(facts: Facts) -> list[Part]:
    """What the sums of votes say about pairs: under masks (secure), nobody sees two participants' masks."""
    by_type = {one: [mean_agreement(_histograms(r, one)) for r in facts.blocks] for one in facts.types}
    mean = mean_agreement([one for record in facts.blocks for one in _histograms(record)])
    chance = facts.pruned_share**2 + (1 - facts.pruned_share) ** 2
    label = "Mean agreement by block and type of Linear. Means over blocks: " + ", ".join(
        f"{path} {np.nanmean(values):.3f}" for path, values in by_type.items()
    )
    axes = ("block", "mean agreement")
    curves = draw(plots.lines, by_type, label, axes, (chance, "random masks"))
    return [
        f"On average, two participants agree on {percent(mean)} of the weights. Updates were added up under "
        "masks (secure), so it is not known which ones agree more.",
        Plot(
            curves,
            "Mean agreement over all pairs, counted from the votes, by block and type of Linear.",
            _table_of_blocks(facts, by_type),
        ),
    ]


def _histograms(record: BlockRecord, of_type: str | None = None) -> list[list[int]]:
    """Vote histograms of a block's Linears."""
    return [
        linear.vote_histogram
        for linear in record.linears.values()
        if of_type in (None, linear.type) and linear.vote_histogram is not None
    ]


def mean_agreement(histograms: Sequence[Sequence[int]]) -> float:
    """Share of weights that two participants treat alike, averaged over all pairs.

    A weight with V of m votes is treated alike by ``V (V - 1) + (m - V) (m - V - 1)`` of ``m (m - 1)``
    ordered pairs.

    Args:
        histograms: Number of weights by number of votes, m + 1 each.
    """
    alike = pairs = 0
    for histogram in histograms:
        m = len(histogram) - 1
        alike += sum(n * (v * (v - 1) + (m - v) * (m - v - 1)) for v, n in enumerate(histogram))
        pairs += sum(histogram) * m * (m - 1)
    return alike / pairs if pairs else float("nan")


def _mean_agreement(facts: Facts) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Agreement [participant, participant] weighted by size, and its mean over pairs by type and block."""
    numbers = {name: number for number, name in enumerate(facts.voting)}
    seen = (facts.voters(r)[: len(m)] for r in facts.blocks for m in r.agreement.values())
    n = 1 + max(numbers.get(name, 0) for names in seen for name in names)
    total, n_weights = np.zeros((n, n)), np.zeros((n, n))
    pairs: dict[str, list[list[float]]] = {one: [[] for _ in facts.blocks] for one in facts.types}
    places = {name: place for place, name in enumerate(facts.voting[:n])}
    for number, record in enumerate(facts.blocks):
        sizes = {linear.path: linear.n_weights for linear in record.linears.values()}
        for path, values in record.agreement.items():
            matrix = np.array(values)
            voters = facts.voters(record)[: len(matrix)]
            known = [place for place, name in enumerate(voters) if name in places]
            rows = [places[voters[place]] for place in known]
            total[np.ix_(rows, rows)] += sizes[path] * matrix[np.ix_(known, known)]
            n_weights[np.ix_(rows, rows)] += sizes[path]
            pairs[type_of(path)][number] += matrix[~np.eye(len(matrix), dtype=bool)].tolist()
    lines = {
        one: [float(np.mean(values)) if values else float("nan") for values in by_block]
        for one, by_block in pairs.items()
    }
    return np.divide(total, n_weights, out=np.full((n, n), np.nan), where=n_weights > 0), lines
