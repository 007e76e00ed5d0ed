"""What the walk recorded of each block: sparsity, votes, agreement, ties, bytes and time."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from math import comb

import numpy as np

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

__all__ = ["agreement", "ties", "time", "traffic", "zeros"]

# What `fedprllm.pruning.agreement` draws from each Linear.
SAMPLE = 16_384
_PHASES = {
    "read": "load the block",
    "observe": "forward passes that collect statistics",
    "select": "rank the weights, make each participant's mask",
    "vote": "count votes, sample the agreement",
    "advance": "forward passes through the pruned block",
    "aggregate": "the server's decision",
    "write": "store the pruned block",
    "record": "count zeros, store the votes",
}
_SURVEYED = "Before that, for OWL, the outliers of each block or the sums to find them. "
_MEASURED = "Counted from the updates that the coordinator received; where participants differ, the largest."
_COMPUTED = "This run was computed in one process; framing and checksums of a network come on top."


# Sparsity --------------------------------------------------------------------------------------


def zeros(facts: Facts) -> Section:
    """Share of zeros by block and kind of Linear."""
    values = np.full((len(facts.paths), len(facts.blocks)), np.nan)
    numbers = [record.block for record in facts.blocks]
    for block, linear in facts.linears():
        share = linear.sparsity
        values[facts.paths.index(linear.path), numbers.index(block)] = share
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
        facts.paths,
        [str(number) for number in numbers],
        f"Heatmap of the sparsity of each Linear of each block. {spread}.",
        limits=limits,
        names=("block", "", "share of zeros"),
    )
    caption = "Share of zeros by block and kind of Linear, those that the dense model had included."
    if not (facts.strategy.server_votes or facts.strategy.pools_text) and len(facts.participants) > 1:
        caption += f" Shown is the model of the last participant, {facts.voting[-1]}."
    section = Section("sparsity", "Sparsity", [f"{spread}.", Plot(figure, caption), *_allocation(facts)])
    notes = [[str(record.block), note] for record in facts.blocks for note in record.notes]
    if notes:
        section.parts.append(Table("Deviations from the requested settings", ("block", "note"), "ll", notes))
    return section


def _allocation(facts: Facts) -> list[str | Table | Plot]:
    """What each block was given to lose, and the outliers it was given for."""
    ratios = facts.record.outlier_ratios
    if not ratios:
        return []
    shown = ratios.get("model") or ratios[facts.voting[-1]]
    rows = [
        [str(record.block), f"{ratio * 100:.3f} %", percent(record.sparsity)]
        for record, ratio in zip(facts.blocks, shown, strict=True)
    ]
    text = (
        f"Blocks with more outliers lose less (OWL): an outlier is a score above {facts.config.owl_m:g} "
        f"times the mean of its block, and a block lies at most {facts.config.owl_lambda:g} from the "
        "sparsity of the model."
    )
    return [text, Table("Allocation of the sparsity", ("block", "outliers", "sparsity"), "lrr", rows)]


# Agreement -------------------------------------------------------------------------------------


def agreement(facts: Facts) -> Section:
    """How alike the participants' masks are: votes, and pairs."""
    section = Section("agreement", "How much the participants agree")
    if len(facts.voting) < 2:
        why = "all text was pooled" if facts.strategy.pools_text else "there is one participant"
        section.parts.append(f"Left out: {why}, so there is one mask only.")
        return section
    if not facts.blocks[0].agreement:
        section.parts.append("Left out: the participants share sums and make no masks of their own.")
        return section
    section.parts.extend([*_votes(facts), *_pairs(facts)])
    return section


def _votes(facts: Facts) -> list[str | Plot]:
    n = len(facts.voting)
    own = facts.pruned_share
    if not facts.has_votes:
        return ["No histogram of votes: they were not counted one by one in this run."]
    histograms = {path: facts.votes(path) for path in facts.paths}
    rows = {"all Linears": facts.votes(), **histograms}
    shares = {path: list(counts / counts.sum()) for path, counts in rows.items()}
    shares["random masks"] = [comb(n, v) * own**v * (1 - own) ** (n - v) for v in range(n + 1)]
    alike = shares["all Linears"][0] + shares["all Linears"][n]
    by_chance = shares["random masks"][0] + shares["random masks"][n]
    lead = (
        f"Of all weights, {percent(shares['all Linears'][n])} would be pruned by every participant and "
        f"{percent(shares['all Linears'][0])} by none; on the other {percent(1 - alike)} they differ "
        f"({percent(1 - by_chance)} if masks were random)."
    )
    if facts.dropouts:
        lead += " Not every participant took part in every block, so fewer votes were possible there."
    if not facts.strategy.server_votes:
        lead += " Nobody voted in this run: the masks were counted for this page only."
    label = "Share of weights by number of votes. " + "; ".join(
        f"{path}: none {percent(parts[0])}, all {percent(parts[-1])}" for path, parts in shares.items()
    )
    figure = plots.shares(shares, label, f"votes to prune, of {n} participants")
    return [
        lead,
        Plot(figure, "Share of weights by number of participants that would prune them, by kind of Linear."),
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
        return ["No two participants took part in the same block."]
    sampled = f"estimated from a sample of {SAMPLE:,} weights per Linear"
    if pairs[0][0] == 1:
        return [f"All masks are the same ({sampled})."]
    mean = sum(pair[0] for pair in pairs) / len(pairs)
    lead = f"Two participants treat {percent(mean)} of the weights alike on average"
    if len(pairs) > 1:
        (low, *least), (high, *most) = pairs[0], pairs[-1]
        lead += f"; least {' and '.join(least)} ({percent(low)}), most {' and '.join(most)} ({percent(high)})"
    np.fill_diagonal(matrix, np.nan)
    limits = (np.floor(pairs[0][0] * 50) / 50, np.ceil(pairs[-1][0] * 50) / 50)
    reference = (
        f"two random masks at sparsity s = {facts.pruned_share:.3g} agree on s² + (1 - s)² = {chance:.3f}"
    )
    first = " Participants are numbered as in their table." if len(names) > plots.MAX_NAMED else ""
    if len(names) < len(facts.voting):
        first += f" The first {len(names)} are shown."
    heatmap = plots.heatmap(
        matrix,
        names,
        names,
        f"Heatmap of the pairwise agreement of masks. {lead}.",
        limits=limits,
        names=("", "", "agreement"),
    )
    label = "Mean pairwise agreement by block and kind of Linear. Means over blocks: " + ", ".join(
        f"{path} {np.nanmean(values):.3f}" for path, values in lines.items()
    )
    curves = plots.lines(lines, label, ("block", "mean pairwise agreement"), (chance, "random masks"))
    return [
        f"{lead}.",
        Plot(
            heatmap,
            f"Pairwise agreement of the masks: share of weights that both prune or both keep, mean over "
            f"all Linears weighted by their size, {sampled}. For reference: {reference}.{first}",
        ),
        Plot(curves, f"The same, mean over all pairs, by block and kind of Linear ({sampled})."),
    ]


def _mean_agreement(facts: Facts) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Agreement [participant, participant] weighted by weights, and its mean over pairs by path and block."""
    numbers = {name: number for number, name in enumerate(facts.voting)}
    seen = (facts.voters(r)[: len(m)] for r in facts.blocks for m in r.agreement.values())
    n = 1 + max(numbers.get(name, 0) for names in seen for name in names)
    total, n_weights = np.zeros((n, n)), np.zeros((n, n))
    lines = {path: [float("nan")] * len(facts.blocks) for path in facts.paths}
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
            pairs = matrix[~np.eye(len(matrix), dtype=bool)]
            lines[path][number] = float(pairs.mean()) if len(pairs) else float("nan")
    return np.divide(total, n_weights, out=np.full((n, n), np.nan), where=n_weights > 0), lines


# Ties ------------------------------------------------------------------------------------------


def ties(facts: Facts) -> Section:
    """How many prunes were chosen among equals, by the server and by each participant."""
    rule = f"Among weights with equal scores or votes the rule of this run decides: {facts.config.ties}."
    if facts.config.vote_ties != facts.config.ties:
        rule += f" Among equal votes it is {facts.config.vote_ties}."
    section = Section("ties", "Prunes that a tie decided", [rule])
    if facts.strategy.server_votes:
        rows = [_tie_row(facts, path, path) for path in facts.paths]
        rows.append(_tie_row(facts, "all Linears", None))
        columns = ("kind of Linear", "prunes", "decided by a tie", "share of prunes")
        strong = frozenset({len(rows) - 1})
        section.parts.append(Table("The server's decision", columns, "lrrr", rows, strong))
    close = [linear.n_close for _, linear in facts.linears() if linear.n_close is not None]
    if close:
        section.parts.append(
            f"Of {count(sum(close), 'prune')} the score lies so close to one that was kept that float "
            "rounding may decide: there pooled text could give another mask."
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
        section.parts.append(f"In {whose} no prune was decided by a tie.")
        return section
    own_rows: list[list[str | Cell]] = [[name, f"{n:,}", percent(n / n_pruned)] for name, n in own.items()]
    heads = ("participant", "decided by a tie", "share of prunes")
    section.parts.append(Table("The participants' own masks", heads, "lrr", numbered(own_rows)))
    return section


def _tie_row(facts: Facts, name: str, path: str | None) -> list[str | Cell]:
    n_pruned, n_ties = facts.total("n_pruned", path), facts.total("n_ties", path)
    share = n_ties / n_pruned if n_pruned else 0.0
    return [name, f"{n_pruned:,}", f"{n_ties:,}", percent(share)]


# Bytes and time --------------------------------------------------------------------------------


def traffic(facts: Facts) -> Section:
    """What leaves a participant."""
    section = Section("bytes", f"What each participant {'sent' if facts.networked else 'would send'}")
    per_block = facts.record.update_bytes_per_block
    sent = facts.sent
    if not any(sent.values()):
        why = "the text itself was pooled" if facts.strategy.pools_text else "every participant pruned alone"
        section.parts.append(f"Nothing: {why}.")
        return section
    rounds = facts.record.rounds
    how = (
        "after each block the server returns its decision, and all participants continue from it"
        if facts.strategy.follows_server
        else "each participant walks through all blocks alone and sends its updates at the end"
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
            Table("Payload of one participant", ("", "exactly", "about"), "lrr", rows),
            *(unequal if least != most else []),
            _MEASURED if facts.networked else _COMPUTED,
        ]
    )
    return section


def time(facts: Facts) -> Section:
    """Seconds by phase, summed over blocks."""
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
    whose = f"for {n} participants one after the other" if n > 1 else "for one participant"
    if facts.strategy.pools_text:
        whose = "for the pooled text"
    if facts.networked:
        whose = "by the coordinator; the participants' own time is not recorded here"
    return Section(
        "time",
        "Time",
        [
            f"{seconds(total)} for {count(len(facts.blocks), 'block')} on {facts.config.device} in "
            f"{facts.config.dtype}, {whose}. Reading text and evaluating are not included.",
            Plot(plots.bars(spent, texts, label), f"Time by phase, summed over blocks. {meaning}."),
        ],
    )
