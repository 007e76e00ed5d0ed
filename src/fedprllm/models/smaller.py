"""The configuration of a model whose tensors became smaller, so that transformers loads it as it is.

Which entry of ``config.json`` says how wide a part is differs from architecture to architecture
(``intermediate_size``, ``ffn_dim``, ``n_inner``). It is found by trying: the right one gives the model, built
without weights, exactly the shapes of the smaller tensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedprllm.errors import ModelError
from fedprllm.files import read_json, write_json
from fedprllm.models.block import Linear
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import CheckpointWriter
from fedprllm.models.source import build_skeleton

__all__ = ["fitting_config", "narrowed_shapes", "shared_width", "write_rest"]

Shapes = dict[str, tuple[int, ...]]
_Path = tuple[str, ...]
# Words in the names of entries that are tried first if they have no value of their own.
_LIKELY = ("inner", "inter", "ffn", "mlp", "feed", "hidden", "dim", "size")


def shared_width(model: BlockwiseModel) -> int:
    """The number of channels that each block's second MLP Linear reads: the same in every block.

    Raises:
        ModelError: A block has no such Linear or several, or their widths differ.
    """
    widths = set()
    for name, linears in zip(model.block_names, model.linears, strict=True):
        readers = [linear for linear in linears.values() if linear.producers]
        if len(readers) != 1:
            raise ModelError(
                f"'{name}' of {type(model.skeleton).__name__} has {len(readers)} Linears whose input "
                "channels are computed one by one from other Linears: expected one, the second of its MLP. "
                "The MLP cannot be made narrower; use another model, or prune single weights"
            )
        widths.add(readers[0].shape[1])
    if len(widths) > 1:
        raise ModelError(
            f"the MLPs of {type(model.skeleton).__name__} have {len(widths)} different widths, "
            f"{', '.join(map(str, sorted(widths)))}: expected one; use another model, or prune single weights"
        )
    return widths.pop()


def narrowed_shapes(model: BlockwiseModel, width: int) -> Shapes:
    """Shapes of all tensors of the model once every MLP has ``width`` channels."""
    shapes = _shapes(model.skeleton)
    for linears in model.linears:
        for linear in linears.values():
            for name, axis, rows in _narrowed(linear, linears):
                if name in shapes:
                    shape = shapes[name]
                    shapes[name] = (*shape[:axis], rows * width, *shape[axis + 1 :])
    return shapes


def _narrowed(linear: Linear, linears: Mapping[str, Linear]) -> Iterator[tuple[str, int, int]]:
    """Tensors that become narrower with a Linear's input, the axis, and the number of entries a channel."""
    if linear.producers:
        yield linear.name, 0 if linear.transposed else 1, 1
    for producer in linear.producers:
        rows = len(producer.channels) // linear.shape[1]
        yield producer.name, 1 if linears[producer.name].transposed else 0, rows
        yield producer.bias, 0, rows


def write_rest(writer: CheckpointWriter, model: BlockwiseModel) -> None:
    """Write everything outside the blocks, with a configuration that fits the blocks' tensors.

    Args:
        writer: Has written the shards of all blocks.
        model: The dense model.

    Raises:
        ModelError: No configuration fits.
    """
    width = _written_width(writer, model)
    changed = {} if width is None else {"config.json": fitting_config(model, width)}
    writer.finish(model.names_outside_blocks(), changed)


def _written_width(writer: CheckpointWriter, model: BlockwiseModel) -> int | None:
    """The number of channels that the MLPs have in the shards; None if they have all of them."""
    found = writer.shapes()
    readers = [linear for linears in model.linears for linear in linears.values() if linear.producers]
    written = [
        (linear.shape[1], found[model.checkpoint.stored_name(linear.name)][0 if linear.transposed else 1])
        for linear in readers
    ]
    return next((narrow for dense, narrow in written if narrow != dense), None)


def fitting_config(model: BlockwiseModel, width: int) -> dict[str, Any]:
    """The content of ``config.json`` with the one changed entry that makes every MLP narrower.

    Args:
        model: The dense model.
        width: Number of channels that the MLPs of the smaller model have.

    Raises:
        ModelError: There is no such entry.
    """
    dense, shapes = shared_width(model), narrowed_shapes(model, width)
    content = read_json(model.folder / "config.json")
    for path in _candidates(model.config.to_dict(), dense):
        changed = _with_entry(content, path, width)
        if _builds(model, changed) == shapes:
            return changed
    raise ModelError(
        f"no entry of {model.folder / 'config.json'} makes the MLPs of {type(model.skeleton).__name__} "
        f"{width} channels wide instead of {dense}: expected one such as intermediate_size, but the width "
        "follows from another size. Use another model, or prune single weights"
    )


def _shapes(skeleton: Any) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}


def _candidates(config: Mapping[str, Any], width: int) -> list[_Path]:
    """Entries that may hold a width: those with this value, then those without a value."""
    entries = list(_entries(config))
    unset = [path for path, value in entries if value is None]
    likely = sorted(unset, key=lambda path: not any(word in path[-1] for word in _LIKELY))
    return [path for path, value in entries if type(value) is int and value == width] + likely


def _entries(config: Mapping[str, Any], prefix: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _with_entry(content: Mapping[str, Any], path: _Path, value: int) -> dict[str, Any]:
    first, *rest = path
    inner = _with_entry(content.get(first) or {}, tuple(rest), value) if rest else value
    return {**content, first: inner}


def _builds(model: BlockwiseModel, content: Mapping[str, Any]) -> Shapes | None:
    """Shapes of a model with this configuration; None if there is no such model."""
    with tempfile.TemporaryDirectory(prefix="fedprllm-") as folder:
        write_json(Path(folder) / "config.json", content, durable=False)
        try:
            return _shapes(build_skeleton(Path(folder), model.dtype))
        except ModelError:
            return None
