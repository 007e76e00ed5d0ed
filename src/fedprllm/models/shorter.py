"""Write a model without some of its blocks, so that transformers loads it as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedprllm.errors import ModelError
from fedprllm.files import read_json
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import CheckpointWriter
from fedprllm.models.further import further_layers, without_further_layers
from fedprllm.models.guards import stored_prefix
from fedprllm.models.smaller import Shapes, builds, entries_of, shapes_of, with_entry

__all__ = ["shorter_config", "write_shorter"]

_N_TOKENS = 8
_TOLERANCE = 0.01  # nats; rounding differs where a model is opened in another precision than its own


def write_shorter(folder: Path, model: BlockwiseModel, dropped: Sequence[int]) -> None:
    """Write a model without some of its blocks.

    Args:
        folder: Folder to write to.
        model: The dense model.
        dropped: Indices of the blocks to leave out.

    Raises:
        ModelError: No configuration describes the shorter model, or its blocks compute something else than
            before because of their new numbers.
    """
    kept = [index for index in range(model.n_blocks) if index not in dropped]
    config = shorter_config(model, kept)
    prefix = stored_prefix(model.checkpoint, model.block_names[0])
    writer = CheckpointWriter(folder, model.checkpoint, model.n_blocks, kept, prefix)
    for index in kept:
        with model.block(index) as block:
            writer.write(index, block.tensors)
    writer.finish(model.names_outside_blocks(), {"config.json": config}, further_layers(model))
    _refuse_other_function(model, kept, folder)


def shorter_config(model: BlockwiseModel, kept: Sequence[int]) -> dict[str, Any]:
    """The content of ``config.json`` for a model that has only these blocks.

    The number of blocks is the entry whose change gives the model, built without weights, the right tensors;
    lists with an entry for every block lose those of the dropped ones.

    Args:
        model: The dense model.
        kept: Indices of its blocks, in order.

    Raises:
        ModelError: There is no such entry.
    """
    content = without_further_layers(model, read_json(model.folder / "config.json"))
    shapes = _shapes_without(model, kept)
    entries = list(entries_of(model.config.to_dict()))
    for path, value in entries:
        if isinstance(value, list) and len(value) == model.n_blocks:
            content = with_entry(content, path, [value[index] for index in kept])
    for path, value in entries:
        if type(value) is int and value == model.n_blocks:
            changed = with_entry(content, path, len(kept))
            if builds(model, changed) == shapes:
                return changed
    raise ModelError(
        f"no entry of {model.folder / 'config.json'} gives {type(model.skeleton).__name__} {len(kept)} "
        f"blocks instead of {model.n_blocks}: expected one such as num_hidden_layers; use another model, or "
        "remove channels"
    )


def _shapes_without(model: BlockwiseModel, kept: Sequence[int]) -> Shapes:
    """Shapes of the tensors of a model that has only these blocks, under their new numbers."""
    prefixes = tuple(f"{name}." for name in model.block_names)
    dense = shapes_of(model.skeleton)
    shapes = {name: shape for name, shape in dense.items() if not name.startswith(prefixes)}
    for number, index in enumerate(kept):
        old, new = prefixes[index], prefixes[number]
        shapes |= {
            f"{new}{name.removeprefix(old)}": shape for name, shape in dense.items() if name.startswith(old)
        }
    return shapes


def _refuse_other_function(model: BlockwiseModel, kept: Sequence[int], folder: Path) -> None:
    """Refuse a model whose blocks depend on their position, by comparing losses on a few tokens.

    Raises:
        ModelError: They do.
    """
    tokens = torch.arange(_N_TOKENS) % model.vocabulary_size
    shorter = BlockwiseModel(folder, str(model.dtype).removeprefix("torch."), str(model.device))
    losses = _losses(model, kept, tokens), _losses(shorter, range(shorter.n_blocks), tokens)
    if not torch.allclose(*losses, rtol=0, atol=_TOLERANCE):
        raise ModelError(
            f"the blocks of {type(model.skeleton).__name__} compute something else at another position "
            "(scaling by the number of the layer, for instance): no block can be dropped; remove channels "
            "instead"
        )


def _losses(model: BlockwiseModel, blocks: Sequence[int], tokens: Tensor) -> Tensor:
    (hidden,) = model.embed(tokens[None])
    for index in blocks:
        with model.block(index) as block:
            hidden = block.forward(hidden)
    with model.head():
        return model.token_losses(hidden, tokens)
