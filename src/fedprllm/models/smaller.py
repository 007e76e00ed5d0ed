"""The configuration of a model whose tensors became smaller, so that transformers loads it as it is.

Which entry of ``config.json`` says how wide a part is differs from architecture to architecture
(``intermediate_size``, ``ffn_dim``, ``n_inner``). It is found by trying: the right one gives the model, built
without weights, exactly the shapes of the smaller tensors.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedprllm.errors import ModelError
from fedprllm.files import read_json, write_json
from fedprllm.models.block import Channels, Linear
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import CheckpointWriter
from fedprllm.models.skeleton import build_skeleton

__all__ = [
    "Shapes",
    "block_sizes",
    "builds",
    "entries_of",
    "fitting_config",
    "part_of",
    "shapes_of",
    "with_entry",
    "write_rest",
]

Shapes = dict[str, tuple[int, ...]]
_Path = tuple[str, ...]
_EntryList = list[tuple[_Path, Any]]
_Edit = dict[_Path, int]
_UNITS = {"mlp": "MLP channels", "heads": "query heads"}
_WORDS = {
    "mlp": "channels are computed one by one from other Linears, as in an MLP",
    "heads": "is computed head by head from separate Linears for query, key and value",
}
# Words in the names of entries that are tried first if they have no value of their own.
_LIKELY = ("inner", "inter", "ffn", "mlp", "feed", "hidden", "dim", "size")


def part_of(model: BlockwiseModel, part: str) -> Channels:
    """The channels or heads that every block has, the same number in each.

    Args:
        model: The dense model.
        part: A name in `Channels.part`.

    Raises:
        ModelError: A block has none or several such parts, or their sizes differ.
    """
    found: list[Channels] = []
    for name, linears in zip(model.block_names, model.linears, strict=True):
        if part == "mlp" and any(linear.family for linear in linears.values()):
            raise ModelError(
                f"'{name}' of {type(model.skeleton).__name__} is a mixture of experts, whose experts cannot "
                f"lose {_UNITS[part]} yet: remove heads or blocks, or prune single weights"
            )
        readers = _readers(linears, part)
        if len(readers) != 1:
            raise ModelError(
                f"'{name}' of {type(model.skeleton).__name__} has {len(readers)} Linears whose input "
                f"{_WORDS[part]}: expected one, to remove {_UNITS[part]}; use another model, or prune single "
                "weights"
            )
        found += [channels for _, channels in readers]
    sizes = {(each.n_units, len(each.units), each.n_groups) for each in found}
    if len(sizes) > 1:
        counts = ", ".join(str(size[0]) for size in sorted(sizes))
        raise ModelError(
            f"the blocks of {type(model.skeleton).__name__} have different numbers of {_UNITS[part]}, "
            f"{counts}: expected one; use another model, or prune single weights"
        )
    return found[0]


def _readers(linears: Mapping[str, Linear], part: str) -> list[tuple[Linear, Channels]]:
    return [
        (linear, linear.channels)
        for linear in linears.values()
        if linear.channels is not None and linear.channels.part == part
    ]


def _narrowed(model: BlockwiseModel, shapes: Shapes, part: str, n_units: int) -> Shapes:
    """Shapes of all tensors of the model once every block has ``n_units`` of a part."""
    shapes = dict(shapes)
    for linears in model.linears:
        for linear, channels in _readers(linears, part):
            tensors = [(linear.name, 0 if linear.transposed else 1)]
            for producer in channels.producers:
                tensors += [
                    (producer.name, 1 if linears[producer.name].transposed else 0),
                    (producer.bias, 0),
                ]
            for name, axis in tensors:
                if name in shapes:
                    shape = list(shapes[name])
                    shape[axis] = shape[axis] // channels.n_units * n_units
                    shapes[name] = tuple(shape)
    return shapes


def block_sizes(model: BlockwiseModel, kept: Mapping[str, int] | None = None) -> list[int]:
    """Number of parameters of every block.

    Args:
        model: The dense model.
        kept: Number of units that every block keeps, by part; all by default.
    """
    shapes = shapes_of(model.skeleton)
    for part, n_units in (kept or {}).items():
        shapes = _narrowed(model, shapes, part, n_units)
    blocks = [(name, model.skeleton.get_submodule(name)) for name in model.block_names]
    return [
        sum(math.prod(shapes[f"{name}.{inner}"]) for inner, _ in block.named_parameters())
        for name, block in blocks
    ]


def write_rest(writer: CheckpointWriter, model: BlockwiseModel) -> None:
    """Write everything outside the blocks, with a configuration that fits the blocks' tensors.

    Args:
        writer: Has written the shards of all blocks.
        model: The dense model.

    Raises:
        ModelError: No configuration fits.
    """
    kept = _written(writer, model)
    changed = {"config.json": fitting_config(model, kept)} if kept else {}
    writer.finish(model.names_outside_blocks(), changed)


def _written(writer: CheckpointWriter, model: BlockwiseModel) -> dict[str, int]:
    """How many units of each part the shards have; parts of which none is missing are left out.

    Raises:
        ModelError: Blocks have different numbers, for which there is no configuration.
    """
    found, kept = writer.shapes(), {}
    for part in _WORDS:
        counts = set()
        for linears in model.linears:
            for linear, channels in _readers(linears, part):
                shape = found[model.checkpoint.stored_name(linear.name)]
                width = shape[0 if linear.transposed else 1]
                counts.add((width * channels.n_units // linear.shape[1], channels.n_units))
        if any(n_units < n_dense for n_units, n_dense in counts):
            if len(counts) > 1:
                numbers = ", ".join(str(n_units) for n_units, _ in sorted(counts))
                raise ModelError(
                    f"the blocks of {writer.folder} have {numbers} {_UNITS[part]}: expected the same number "
                    "in each. The decisions are not of one run; delete the folder and run again"
                )
            kept[part] = counts.pop()[0]
    return kept


def fitting_config(model: BlockwiseModel, kept: Mapping[str, int]) -> dict[str, Any]:
    """The content of ``config.json``, changed in as few entries as give the model the smaller shapes.

    Args:
        model: The dense model.
        kept: Number of units that every block keeps, by part.

    Raises:
        ModelError: There are no such entries.
    """
    content: dict[str, Any] = read_json(model.folder / "config.json")
    shapes = shapes_of(model.skeleton)
    for part, n_units in kept.items():
        shapes = _narrowed(model, shapes, part, n_units)
        content = _fitted(model, content, part, n_units, shapes)
    return content


def _fitted(
    model: BlockwiseModel, content: dict[str, Any], part: str, n_units: int, shapes: Shapes
) -> dict[str, Any]:
    channels = part_of(model, part)
    for edit in _EDITS[part](list(entries_of(model.config.to_dict())), channels, n_units):
        changed = content
        for path, value in edit.items():
            changed = with_entry(changed, path, value)
        if builds(model, changed) == shapes:
            return changed
    raise ModelError(
        f"no entry of {model.folder / 'config.json'} gives each block of {type(model.skeleton).__name__} "
        f"{n_units} instead of {channels.n_units} {_UNITS[part]}: their number follows from another size, or "
        "must divide it. Remove another number, use another model, or prune single weights"
    )


def shapes_of(skeleton: Any) -> Shapes:
    """Shapes of all tensors of a model."""
    return {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}


def _width_edits(entries: _EntryList, channels: Channels, n_units: int) -> Iterator[_Edit]:
    """Changes of one entry that may hold the width: those with its value, then those without a value."""
    unset = [path for path, value in entries if value is None]
    likely = sorted(unset, key=lambda path: not any(word in path[-1] for word in _LIKELY))
    for path in [path for path, value in entries if _is(value, channels.n_units)] + likely:
        yield {path: n_units}


def _head_edits(entries: _EntryList, channels: Channels, n_units: int) -> Iterator[_Edit]:
    """Changes of entries that count heads, one or all of them; the size of a head becomes explicit."""
    size = len(channels.units) // channels.n_units
    paths = [path for path, value in entries if _is(value, channels.n_units) and "head" in path[-1]]
    for chosen in [*([path] for path in paths), paths]:
        yield {(*path[:-1], "head_dim"): size for path in chosen} | dict.fromkeys(chosen, n_units)


def _is(value: Any, number: int) -> bool:
    return type(value) is int and value == number


_EDITS = {"mlp": _width_edits, "heads": _head_edits}


def entries_of(config: Mapping[str, Any], prefix: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Every entry of a configuration with its path, those of nested parts too."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from entries_of(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def with_entry(content: Mapping[str, Any], path: _Path, value: Any) -> dict[str, Any]:
    """A configuration with another value of one entry."""
    first, *rest = path
    inner = with_entry(content.get(first) or {}, tuple(rest), value) if rest else value
    return {**content, first: inner}


def builds(model: BlockwiseModel, content: Mapping[str, Any]) -> Shapes | None:
    """Shapes of a model with this configuration; None if there is no such model."""
    with tempfile.TemporaryDirectory(prefix="fedprllm-") as folder:
        write_json(Path(folder) / "config.json", content, durable=False)
        try:
            return shapes_of(build_skeleton(Path(folder), model.dtype))
        except ModelError:
            return None
