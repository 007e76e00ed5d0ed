"""What a run leaves to its user: the model, how to load it, and its size and speed."""

from __future__ import annotations

import json
from collections.abc import Mapping

from markupsafe import Markup

from fedprllm.report.facts import Facts
from fedprllm.report.layout import Cell, Code, Part, Section, Table, code
from fedprllm.report.stored import Stored, stored
from fedprllm.report.words import percent, size

__all__ = ["files_tile", "loading", "obtained"]

_SMALLER = (
    "A smaller dense model: whatever runs the dense model runs this one, with fewer numbers to store and to "
    "read for each token. How much faster that is depends on the machine and the software."
)
_ZEROS = Markup(
    "The files are as large as those of the dense model, and it is as fast: a zero is stored and multiplied "
    "like any other number. {} stores a zero as one bit and restores the files bit by bit. Only "
    "software with kernels for sparse matrices is faster. For a model that is smaller and faster everywhere, "
    "remove whole parts: {}."
).format(code("fedprllm pack"), code("--structure mlp=0.2"))
_PATTERN = (
    "Among the patterns N:M, those that keep more weights cost far less: try 6:8 before 2:4. On SmolLM2-135M,"
    " with statistics of four kinds of text, 6:8 raised the perplexity from 10.9 to 12.7, and 2:4 to 62.6."
)


def obtained(facts: Facts) -> Section:
    """The model's folder, how to load it, and its size and speed beside those of the dense model."""
    section = Section("got", "What you got")
    section.parts.extend(_folders(facts))
    section.parts.append(_sizes(facts))
    section.parts.append(_ZEROS if facts.record.reduction is None else _SMALLER)
    pattern = facts.config.n_m
    if pattern is not None and 2 * pattern[0] <= pattern[1]:
        section.parts.append(_PATTERN)
    return section


def loading(folder: str) -> Code:
    """The lines that load a model."""
    return Code(
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(folder, ensure_ascii=False)})"
    )


def files_tile(facts: Facts) -> list[tuple[str, str, str]]:
    """Size of the weight files as a key figure; nothing if it is not known."""
    found = facts.record.reduction
    if found is not None:
        return [("weight files", size(found.n_bytes[1]), f"dense: {size(found.n_bytes[0])}")]
    kept = _stored(facts)
    if kept is None:
        return []
    return [("weight files", size(kept.n_bytes), f"like the dense model's; packed: {_packed(kept)}")]


def _folders(facts: Facts) -> list[Part]:
    shown = facts.shown_folders
    if len(shown) > 1:
        rows = [[name, folder] for name, folder in shown.items()]
        one, *_ = shown.values()
        return [
            "One model for each participant, each an ordinary Hugging Face folder:",
            Table("Folders of the models", ("participant", "folder"), "lp", rows),
            loading(one),
        ]
    (folder,) = shown.values()
    where = Markup("An ordinary Hugging Face folder, {}, which loads as usual:").format(code(folder))
    parts: list[Part] = [where, loading(folder)]
    if facts.networked:
        parts.append(
            Markup(
                "Each participant builds the same model from its own dense copy ({}), and every tensor is "
                "compared with the coordinator's."
            ).format(code("fedprllm participate NAME --fetch RUN"))
        )
    return parts


def _sizes(facts: Facts) -> Table:
    """Size and speed beside the dense model's, as far as they are known."""
    found, kept, record = facts.record.reduction, _stored(facts), facts.record
    rows: list[list[str | Cell]] = []
    if found is not None:
        rows += _fewer(
            {"parameters": found.n_parameters, "parameters of the blocks": found.n_block_parameters}
        )
    if found is None or record.n_zeros:
        zeros = Cell(f"{record.n_zeros:,}", percent(facts.sparsity))
        rows.append([f"zeros among {record.n_prunable:,} prunable weights", "", zeros])
    if found is not None:
        before, after = found.n_bytes
        rows.append(["weight files", size(before), Cell(size(after), f"-{percent(1 - after / before)}")])
    elif kept is not None:
        rows.append(["weight files", size(kept.n_bytes), Cell(size(kept.n_bytes), "as large")])
    if found is None and kept is not None:
        rows.append(["packed with fedprllm pack", "", _packed(kept)])
    speed = "as fast" if found is None else "depends on machine and software"
    rows.append(["speed in ordinary software", "", speed])
    if not any(before for _, before, _ in rows):
        return Table("Size and speed", ("", "this model"), "lr", [[name, after] for name, _, after in rows])
    return Table("Size and speed", ("", "dense", "this model"), "lrr", rows)


def _fewer(numbers: Mapping[str, tuple[int, int]]) -> list[list[str | Cell]]:
    return [
        [name, f"{before:,}", Cell(f"{after:,}", f"-{percent(1 - after / before)}")]
        for name, (before, after) in numbers.items()
    ]


def _stored(facts: Facts) -> Stored | None:
    """The files of the model; None if there are several models, or if the folder is elsewhere by now."""
    folders = list(facts.folders.values())
    return stored(folders[0], facts.record.n_zeros) if len(folders) == 1 else None


def _packed(kept: Stored) -> str:
    return size(kept.packed) if kept.packed is not None else f"at most {size(kept.packed_at_most)}"
