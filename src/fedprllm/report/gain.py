"""What a user of the result gains, and what another way to prune would give."""

from __future__ import annotations

from fedprllm.pruning.records import ChoiceRecord, Reduction
from fedprllm.report.facts import Cell, Facts, Section, Table, percent, perplexity, size

__all__ = ["gain"]

_SMALLER = (
    "A smaller dense model: whatever runs the dense model runs this one, with fewer numbers to store and to "
    "read for each token. How much faster that is depends on the machine and the software."
)
_ZEROS = (
    "The files are as large as those of the dense model, and it is as fast: a zero is stored and multiplied "
    "like any other number. `fedprllm pack` stores a zero as one bit and restores the files bit by bit. Only "
    "software with kernels for sparse matrices is faster. For a model that is smaller and faster everywhere, "
    "remove whole parts: `--structure mlp=0.2`."
)
_PATTERN = (
    "Among the patterns N:M, those that keep more weights cost far less: try 6:8 before 2:4. On SmolLM2-135M,"
    " with statistics of four kinds of text, 6:8 raised the perplexity from 10.9 to 12.7, and 2:4 to 62.6."
)


def gain(facts: Facts) -> Section:
    """Size and speed of the result beside those of the dense model."""
    reduction, pattern = facts.record.reduction, facts.config.n_m
    section = Section("gain", "What a user of the result gains")
    if reduction is None:
        section.parts.append(_ZEROS)
    else:
        section.parts.extend([_SMALLER, _sizes(reduction)])
    if facts.record.choice is not None:
        section.parts.extend(_choice(facts.record.choice))
    if pattern is not None and 2 * pattern[0] <= pattern[1]:
        section.parts.append(_PATTERN)
    return section


def _choice(choice: ChoiceRecord) -> list[str | Table]:
    """Which structures could have been removed, and what each would have cost."""
    rows: list[list[str | Cell]] = [
        [
            Cell(one.structure, "chosen" if one is choice.chosen else ""),
            percent(one.of_blocks),
            perplexity(one.perplexity),
        ]
        for one in choice.candidates
    ]
    columns = ("structure", "fewer block parameters", "perplexity on held-out windows")
    refused = [f"Not measured: {name} ({reason})." for name, reason in choice.refused.items()]
    return [
        f"Chosen: {choice.sentence}. At least {percent(choice.smaller)} of the blocks' parameters had to go. "
        "For this comparison, each structure was removed on the basis of the other windows only.",
        Table("Structures to choose among", columns, "lrr", rows),
        *refused,
    ]


def _sizes(found: Reduction) -> Table:
    """Parameters and bytes before and after."""
    numbers = {"parameters": found.n_parameters, "parameters of the blocks": found.n_block_parameters}
    shown = {name: (f"{before:,}", f"{after:,}") for name, (before, after) in numbers.items()}
    shown["weight files"] = size(found.n_bytes[0]), size(found.n_bytes[1])
    shares = [1 - after / before for before, after in (*numbers.values(), found.n_bytes)]
    rows: list[list[str | Cell]] = [
        [name, before, Cell(after, f"-{percent(share)}")]
        for (name, (before, after)), share in zip(shown.items(), shares, strict=True)
    ]
    return Table("Dense and smaller", ("", "dense", "smaller"), "lrr", rows)
