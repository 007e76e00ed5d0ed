"""What a run with a structure removed from each block."""

from __future__ import annotations

from fedprllm.pruning.records import BlockRecord, ChoiceRecord
from fedprllm.report.facts import Facts
from fedprllm.report.layout import Cell, Part, Section, Table
from fedprllm.report.words import count, percent, perplexity

__all__ = ["removed"]


def removed(facts: Facts) -> Section | None:
    """The parts that the model lost, by block; None if it lost none."""
    if facts.record.reduction is None:
        return None
    parts: list[Part] = [f"The run removed {facts.config.structure}."]
    if facts.record.choice is not None:
        parts = _choice(facts.record.choice)
    for table in (_dropped(facts.blocks), _experts(facts.blocks), _narrower(facts)):
        parts.extend([table] if table is not None else [])
    return Section("removed", "What was removed", parts)


def _choice(choice: ChoiceRecord) -> list[Part]:
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


def _dropped(blocks: list[BlockRecord]) -> Table | None:
    if not any(record.dropped for record in blocks):
        return None
    rows = [
        [
            str(record.block),
            "" if record.influence is None else f"{record.influence:.4f}",
            "dropped" if record.dropped else "kept",
        ]
        for record in blocks
    ]
    return Table("Blocks by how far they turn the hidden states", ("block", "influence", ""), "lrl", rows)


def _experts(blocks: list[BlockRecord]) -> Table | None:
    rows = [
        [str(record.block), ", ".join(map(str, record.removed_experts))]
        for record in blocks
        if record.removed_experts
    ]
    return (
        Table("Experts that were removed", ("block", "experts, counted from 0"), "ll", rows) if rows else None
    )


def _narrower(facts: Facts) -> Table | None:
    """Shapes of the Linears that became smaller, and in how many blocks."""
    shapes: dict[tuple[str, str, str], int] = {}
    for _, linear in facts.linears():
        if linear.dense_shape is not None and linear.dense_shape != linear.shape:
            before, after = (" by ".join(map(str, shape)) for shape in (linear.dense_shape, linear.shape))
            key = linear.type, before, after
            shapes[key] = shapes.get(key, 0) + 1
    rows: list[list[str | Cell]] = [
        [name, before, Cell(after, f"{count(n, 'Linear')}")] for (name, before, after), n in shapes.items()
    ]
    columns = ("type of Linear", "dense", "this model")
    return Table("Outputs by inputs of the Linears", columns, "lrr", rows) if rows else None
