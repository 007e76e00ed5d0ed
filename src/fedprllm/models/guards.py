"""Refuse models whose blocks would be pruned wrongly or hardly at all, from their structure alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from fedprllm.errors import ModelError
from fedprllm.models.block import Linear
from fedprllm.models.checkpoint import Checkpoint
from fedprllm.models.find import find_blocks, find_linears

__all__ = [
    "coverage",
    "coverage_notes",
    "refuse_different_ties",
    "refuse_dtypes",
    "refuse_further_blocks",
    "refuse_low_coverage",
    "refuse_missing",
    "refuse_structure",
    "stored_prefix",
]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LEAST_COVERAGE = 0.5
NOTED_COVERAGE = 0.9


def refuse_structure(skeleton: PreTrainedModel) -> None:
    """Refuse what the skeleton alone shows, so that no checkpoint is read or converted in vain.

    Raises:
        ModelError: The blocks have fused experts, share parameters, or consist mostly of something else than
            Linears.
    """
    prefix, blocks = find_blocks(skeleton)
    _refuse_fused_experts(skeleton, prefix, blocks)
    _refuse_shared_parameters(skeleton, prefix, blocks)
    for index, block in enumerate(blocks):
        linears = find_linears(block, f"{prefix}.{index}")
        refuse_low_coverage(skeleton, f"{prefix}.{index}", coverage(block, linears))


def _refuse_fused_experts(skeleton: nn.Module, prefix: str, blocks: Sequence[nn.Module]) -> None:
    for index, block in enumerate(blocks):
        for path, parameter in block.named_parameters():
            owner = block.get_submodule(path.rpartition(".")[0])
            experts = "expert" in f"{path} {type(owner).__name__}".lower()
            if parameter.ndim >= 3 and experts and not isinstance(owner, nn.Conv1d):
                raise ModelError(
                    f"'{prefix}.{index}.{path}' of {type(skeleton).__name__} has shape "
                    f"{tuple(parameter.shape)}: fused mixture-of-experts weights of this form cannot be "
                    "pruned yet; use another model"
                )


def _refuse_shared_parameters(skeleton: nn.Module, prefix: str, blocks: Sequence[nn.Module]) -> None:
    """Refuse parameters of a block that are also used elsewhere: pruning one place would change the other."""
    first: dict[int, str] = {}
    inside = {f"{prefix}.{index}" for index in range(len(blocks))}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        place = next((name[: len(prefix) + 1 + len(part)] for part in _index_of(name, prefix)), "")
        place = place if place in inside else ""
        other = first.setdefault(id(parameter), place)
        if other != place:
            raise ModelError(
                f"'{name}' of {type(skeleton).__name__} is shared between '{other or 'the rest'}' and "
                f"'{place or 'the rest'}' of the model: expected blocks with parameters of their own. This "
                "architecture cannot be pruned block by block yet; use another model"
            )


def _index_of(name: str, prefix: str) -> list[str]:
    """The position of the block that a parameter belongs to, as text; empty outside all blocks."""
    return [name[len(prefix) + 1 :].partition(".")[0]] if name.startswith(f"{prefix}.") else []


def coverage(block: nn.Module, linears: Mapping[str, Linear]) -> float:
    """Share of a block's parameters of two or more dimensions that belong to prunable Linears."""
    n_all = sum(parameter.numel() for parameter in block.parameters() if parameter.ndim >= 2)
    return sum(linear.n_weights for linear in linears.values()) / n_all if n_all else 0.0


def refuse_low_coverage(skeleton: nn.Module, name: str, share: float) -> None:
    """Refuse a block of which pruning would reach less than half.

    Raises:
        ModelError: It would.
    """
    if share < LEAST_COVERAGE:
        raise ModelError(
            f"only {share:.1%} of the weight matrices in block '{name}' of {type(skeleton).__name__} are "
            f"Linears that can be pruned: expected at least {LEAST_COVERAGE:.0%}, because most of the model "
            "would stay dense; use another model"
        )


def coverage_notes(block: nn.Module, linears: Mapping[str, Linear], share: float) -> list[str]:
    """A sentence for the record if a tenth of a block stays dense; otherwise nothing."""
    if share >= NOTED_COVERAGE:
        return []
    pruned = {linear.path for linear in linears.values()}
    left = [
        path
        for path, parameter in block.named_parameters()
        if parameter.ndim >= 2 and path.rpartition(".")[0] not in pruned
    ]
    named = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    return [f"{share:.1%} of the block's weight matrices are prunable; these stay dense: {named}"]


def refuse_missing(skeleton: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without some of the model's tensors.

    Raises:
        ModelError: Tensors are missing.
    """
    state = skeleton.state_dict(keep_vars=True)
    # A tied weight is usually stored under just one of its names.
    stored = {id(tensor) for name, tensor in state.items() if name in checkpoint}
    missing = [name for name, tensor in state.items() if id(tensor) not in stored]
    if missing:
        raise ModelError(
            f"{checkpoint.folder} lacks {len(missing)} tensors of {type(skeleton).__name__}, the first is "
            f"'{missing[0]}': download the model again"
        )


def refuse_further_blocks(
    skeleton: PreTrainedModel, checkpoint: Checkpoint, block_names: Sequence[str]
) -> None:
    """Refuse a checkpoint with more blocks than the configuration says: they would stay dense.

    Raises:
        ModelError: It has more, and transformers does not leave them out on purpose.
    """
    n_blocks = len(block_names)
    prefix = stored_prefix(checkpoint, block_names[0])
    ignored = skeleton._keys_to_ignore_on_load_unexpected or ()
    further = {
        int(found[1])
        for name in checkpoint.unknown
        if (found := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))
        and int(found[1]) >= n_blocks
        and not any(re.search(pattern, name) for pattern in ignored)
    }
    if further:
        raise ModelError(
            f"{checkpoint.folder} holds weights of {max(further) + 1} blocks ('{prefix}.{max(further)}'), "
            f"and its config.json says {n_blocks}: correct config.json, or download the model again"
        )


def stored_prefix(checkpoint: Checkpoint, first_block: str) -> str:
    """What the names of all blocks' tensors begin with in the files."""
    number = first_block.rpartition(".")[2]
    for name in checkpoint.names:
        inside = name.removeprefix(first_block)
        ending = f".{number}{inside}"
        if name.startswith(f"{first_block}.") and checkpoint.stored_name(name).endswith(ending):
            return checkpoint.stored_name(name).removesuffix(ending)
    return first_block.rpartition(".")[0]


def refuse_dtypes(skeleton: PreTrainedModel, folder: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse quantized weights: their numbers are not the weights themselves.

    Raises:
        ModelError: A weight is stored in another precision than the usual floating-point ones.
    """
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise ModelError(
                f"'{name}' of {type(skeleton).__name__} in {folder} is stored as {dtype}: expected one of "
                f"{', '.join(map(str, _DTYPES))}. The model is quantized; give the unquantized checkpoint, "
                "or a GGUF file"
            )


def refuse_different_ties(skeleton: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse weights that the configuration ties although the checkpoint stores different values for them.

    Versions of transformers differ in which of the two they use.

    Raises:
        ModelError: There are such weights.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        if name in checkpoint:
            names.setdefault(id(tensor), []).append(name)
    for first, *others in names.values():
        for other in others:
            if not checkpoint.are_equal(first, other):
                raise ModelError(
                    f"{checkpoint.folder} stores two different tensors, '{first}' and '{other}', that its "
                    f"config.json ties into one for {type(skeleton).__name__} (tie_word_embeddings): set "
                    "tie_word_embeddings to false in config.json if both are meant, or delete the one that "
                    "is out of date"
                )
