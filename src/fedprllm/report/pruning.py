"""What the run recorded about each block: sparsity, votes, agreement, ties, bytes and time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np

from fedprllm.pruning.records import BlockRecord, type_of
from fedprllm.report import plots
from fedprllm.report.facts import (
    Cell,
    Facts,
    Plot,
    Section,
    Table,
    count,
    numbered,
    percent,
    seconds,
    size,
    size_range,
)
from fedprllm.sharing import SHARING

__all__ = ["agreement", "mean_agreement", "ties", "time", "traffic", "zeros"]

# Sample size of `fedprllm.pruning.agreement` for each Linear.
SAMPLE = 16_384
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
_SURVEYED = "Before that, OWL needs each block's number of outliers, or the sums to count them. "
_MEASURED = "Measured on the updates that the coordinator received; if they differ, the largest counts."
_COMPUTED = "This run took place in one process; over a network, framing and checksums are added."


# Sparsity --------------------------------------------------------------------------------------


def zeros(facts: Facts) -> Section:
    """Fraction of zeros by block and type of Linear."""
    n_zeros, n_weights = np.zeros((2, len(facts.types), len(facts.blocks)))
    numbers = [record.block for record in facts.blocks]
    for block, linear in facts.linears():
        place = facts.types.index(linear.type), numbers.index(block)
        n_zeros[place] += linear.n_zeros
        n_weights[place] += linear.n_weights
    values = np.divide(n_zeros, n_weights, out=np.full(n_zeros.shape, np.nan), where=n_weights > 0)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    uniform = high - low < 0.01
    limits = (0.0, 1.0) if uniform else (np.floor(low * 10) / 10, np.ceil(high * 10) / 10)
    spread = (
        f"Uniform: every Linear of every block has {percent(low)} zeros"
        if percent(low) == percent(high)
        else f"{'Nearly uniform: t' if uniform else 'T'}he Linears have between {percent(low)} and "
        f"{percent(high)} zeros"
    )
    figure = plots.heatmap(
        values,
        facts.types,
        [str(number) for number in numbers],
        f"Heatmap of the sparsity of each Linear of each block. {spread}.",
        limits=limits,
        names=("block", "", "share of zeros"),
    )
    caption = "Share of zeros by block and type of Linear, including the zeros of the dense model."
    if not (facts.strategy.server_votes or facts.strategy.pools_text) and len(facts.participants) > 1:
        caption += f" The figure shows the model of the last participant, {facts.voting[-1]}."
    section = Section("sparsity", "Sparsity", [f"{spread}.", Plot(figure, caption), *_allocation(facts)])
    notes = [[str(record.block), note] for record in facts.blocks for note in record.notes]
    notes += [["all", note] for note in facts.record.reach()]
    if notes:
        section.parts.append(Table("Deviations from the requested settings", ("block", "note"), "ll", notes))
    return section


def _allocation(facts: Facts) -> list[str | Table | Plot]:
    """The sparsity allocated to each block and the outliers that it is based on."""
    ratios = facts.record.outlier_ratios
    if not ratios:
        return []
    shown = ratios.get("model") or ratios[facts.voting[-1]]
    rows = [
        [str(record.block), f"{ratio * 100:.3f} %", percent(record.sparsity)]
        for record, ratio in zip(facts.blocks, shown, strict=True)
    ]
    text = (
        "Blocks with more outliers are pruned less (OWL): an outlier is a score above "
        f"{facts.config.owl_m:g} times the mean of its block, and a block's sparsity differs by at most "
        f"{facts.config.owl_lambda:g} from that of the model."
    )
    return [text, Table("Allocation of the sparsity", ("block", "outliers", "sparsity"), "lrr", rows)]


# Agreement -------------------------------------------------------------------------------------


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


def _votes(facts: Facts) -> list[str | Plot]:
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
    figure = plots.shares(shares, label, f"votes to prune, of {n} participants")
    return [
        lead,
        Plot(figure, "Share of weights by number of participants that would prune them, by type of Linear."),
    ]


def _pairs(facts: Facts) -> list[str | Plot]:
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
    limits = (np.floor(pairs[0][0] * 50) / 50, np.ceil(pairs[-1][0] * 50) / 50)
    reference = (
        f"two random masks at sparsity s = {facts.pruned_share:.3g} agree on s² + (1 - s)² = {chance:.3f}"
    )
    first = " Participants are numbered as in their table." if len(names) > plots.MAX_NAMED else ""
    if len(names) < len(facts.voting):
        first += f" Only the first {len(names)} are shown."
    heatmap = plots.heatmap(
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
    curves = plots.lines(lines, label, ("block", "mean pairwise agreement"), (chance, "random masks"))
    return [
        f"{lead}.",
        Plot(
            heatmap,
            f"Pairwise agreement of the masks: share of weights that both prune or both keep, averaged over "
            f"all Linears weighted by their size, {sampled}. For reference: {reference}.{first}",
        ),
        Plot(curves, f"The same, averaged over all pairs, by block and type of Linear ({sampled})."),
    ]


def _mean_of_pairs(facts: Facts) -> list[str | Plot]:
    """What the sums of votes say about pairs: under masks (secure), nobody sees two participants' masks."""
    by_type = {one: [mean_agreement(_histograms(r, one)) for r in facts.blocks] for one in facts.types}
    mean = mean_agreement([one for record in facts.blocks for one in _histograms(record)])
    chance = facts.pruned_share**2 + (1 - facts.pruned_share) ** 2
    label = "Mean agreement by block and type of Linear. Means over blocks: " + ", ".join(
        f"{path} {np.nanmean(values):.3f}" for path, values in by_type.items()
    )
    curves = plots.lines(by_type, label, ("block", "mean agreement"), (chance, "random masks"))
    return [
        f"On average, two participants agree on {percent(mean)} of the weights. Updates were added up under "
        "masks (secure), so it is not known which ones agree more.",
        Plot(curves, "Mean agreement over all pairs, counted from the votes, by block and type of Linear."),
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


# Ties ------------------------------------------------------------------------------------------


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


# Bytes and time --------------------------------------------------------------------------------


def traffic(facts: Facts) -> Section:
    """What leaves a participant."""
    section = Section("bytes", f"What each participant {'sent' if facts.networked else 'would send'}")
    per_block = facts.record.update_bytes_per_block
    sent = facts.sent
    if not any(sent.values()):
        why = "the text itself was pooled" if facts.strategy.pools_text else "each participant pruned alone"
        section.parts.append(f"No updates: {why}.")
        return section
    rounds = facts.record.rounds
    how = (
        "after each block the server returns its decision, and all participants continue from it"
        if facts.strategy.follows_server
        else "each participant goes through all blocks on its own and sends all updates at the end"
    )
    low, high = min(per_block), max(per_block)
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    least, most = min(sent.values()), max(sent.values())
    total = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    rows = [
        ["per block", f"{each} bytes", size_range(per_block)],
        ["in total", f"{total} bytes", size_range(sent.values())],
        ["rounds", f"{rounds:,}", ""],
    ]
    survey = sum(facts.record.survey_bytes_per_block)
    if survey:
        rows.insert(0, ["before pruning, to find outliers", f"{survey:,} bytes", size(survey)])
    n_blocks = {name: one.n_blocks or 0 for name, one in facts.participants.items()}
    own_rows: list[list[str | Cell]] = [
        [name, f"{n_blocks[name]:,}", f"{n:,} bytes"] for name, n in sent.items()
    ]
    unequal = [Table("By participant", ("", "blocks", "in total"), "lrr", numbered(own_rows))]
    section.parts.extend(
        [
            f"{SHARING[facts.config.share].content} {_SURVEYED if survey else ''}Nothing else is shared. "
            f"{count(rounds, 'round')} of communication: {how}.",
            Table("Payload of one participant", ("", "exact", "approximate"), "lrr", rows),
            *(unequal if least != most else []),
            _MEASURED if facts.networked else _COMPUTED,
        ]
    )
    return section


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
            Plot(plots.bars(spent, texts, label), f"Time by phase, summed over blocks. {meaning}."),
        ],
    )
