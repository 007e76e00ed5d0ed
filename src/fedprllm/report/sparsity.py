"""How many zeros each block and each type of Linear has."""

from __future__ import annotations

import numpy as np

from fedprllm.report import plots
from fedprllm.report.drawing import draw
from fedprllm.report.facts import Facts
from fedprllm.report.layout import Part, Plot, Section, Table
from fedprllm.report.words import percent

__all__ = ["zeros"]


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
    limits = (0.0, 1.0) if uniform else (float(np.floor(low * 10) / 10), float(np.ceil(high * 10) / 10))
    spread = (
        f"Uniform: every Linear of every block has {percent(low)} zeros"
        if percent(low) == percent(high)
        else f"{'Nearly uniform: t' if uniform else 'T'}he Linears have between {percent(low)} and "
        f"{percent(high)} zeros"
    )
    lead = f"{spread}, including those of the dense model."
    if not (facts.strategy.server_votes or facts.strategy.pools_text) and len(facts.participants) > 1:
        lead += f" They were counted in the model of the last participant, {facts.voting[-1]}."
    section = Section("sparsity", "Sparsity", [lead])
    if percent(low) != percent(high):
        section.parts.append(_map(facts, values, numbers, limits, spread))
    section.parts.extend(_allocation(facts))
    return section


def _map(
    facts: Facts, values: np.ndarray, numbers: list[int], limits: tuple[float, float], spread: str
) -> Plot:
    """The share of zeros by block and type of Linear."""
    figure = draw(
        plots.heatmap,
        values,
        facts.types,
        [str(number) for number in numbers],
        f"Heatmap of the sparsity of each Linear of each block. {spread}.",
        limits=limits,
        names=("block", "", "share of zeros"),
    )
    shares = [
        [name, *("" if np.isnan(value) else percent(value) for value in row)]
        for name, row in zip(facts.types, values, strict=True)
    ]
    columns = ("type of Linear", *(f"block {number}" for number in numbers))
    table = Table("Share of zeros", columns, "l" + "r" * len(numbers), shares)
    return Plot(figure, "Share of zeros by block and type of Linear.", table)


def _allocation(facts: Facts) -> list[Part]:
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
