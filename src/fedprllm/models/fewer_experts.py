"""Write a model whose blocks have fewer experts, so that transformers loads it as it is.

Which entry of ``config.json`` counts experts, and which tensors of a router have a row for each of them, is
found by trying: the right entry gives the model, built without weights, fewer experts and nothing else but
such rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedprllm.errors import ModelError
from fedprllm.files import read_json
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import CheckpointWriter
from fedprllm.models.experts import UnfusedExperts
from fedprllm.models.further import further_layers, without_further_layers
from fedprllm.models.smaller import Shapes, builds, entries_of, shapes_of, with_entry

__all__ = ["Experts", "FewerExperts", "experts_of", "fewer_experts", "write_fewer_experts"]


@dataclass(frozen=True)
class Experts:
    """The experts of a model, of which every block that has any has equally many.

    Attributes:
        paths: Path of the experts of each block; empty for a block without experts.
        n_experts: Number of experts of a block.
        n_groups: Number of groups of consecutive experts among which a router chooses first.
        n_chosen_groups: Number of groups that it chooses.
        n_chosen: Number of experts that it chooses for each token.
    """

    paths: list[str]
    n_experts: int
    n_groups: int
    n_chosen_groups: int
    n_chosen: int

    def n_reachable(self, n_left: int) -> int:
        """Number of experts that a router could choose for one token if a block had ``n_left``.

        The routers that know groups compare them by two experts of each.
        """
        each = n_left // self.n_groups
        return each * self.n_chosen_groups if self.n_groups == 1 or each > 1 else 0


@dataclass(frozen=True)
class FewerExperts:
    """How a model with fewer experts is described.

    Attributes:
        config: Content of its ``config.json``.
        routers: The tensors outside the experts that become smaller, with the dimension that counts experts.
    """

    config: dict[str, Any]
    routers: dict[str, int]


def experts_of(model: BlockwiseModel) -> Experts:
    """The experts of a model.

    Raises:
        ModelError: It has none, or not the same number in each block, or they are not computed in the one way
            that transformers promises for fused experts.
    """
    name = type(model.skeleton).__name__
    found = list(zip(model.block_names, model.linears, model.experts, strict=True))
    for block, linears, modules in found:
        if len(modules) > 1 or (not modules and any(linear.family for linear in linears.values())):
            raise ModelError(
                f"the experts of '{block}' of {name} cannot be removed: expected one set of experts that "
                "transformers knows as such; use another model, or prune single weights"
            )
    modules = [of_block[0] for of_block in model.experts if of_block]
    if not modules:
        raise ModelError(
            f"{name} has no experts to remove: expected a mixture of experts; remove channels, heads or "
            "blocks instead"
        )
    _refuse_different(name, modules)
    paths = [_path_of(block, linears) for block, linears, _ in found]
    _refuse_tables(model, filter(None, paths))
    groups = getattr(model.config.get_text_config(), "topk_group", None)
    n_groups = modules[0].n_groups
    return Experts(
        paths,
        modules[0].n_experts,
        n_groups,
        groups if n_groups > 1 and isinstance(groups, int) else n_groups,
        max(each.n_chosen for each in modules),
    )


def _refuse_different(name: str, modules: Sequence[UnfusedExperts]) -> None:
    counts = sorted({each.n_experts for each in modules})
    if len(counts) > 1:
        raise ModelError(
            f"the blocks of {name} have {', '.join(map(str, counts))} experts: expected the same number in "
            "each; use another model, or prune single weights"
        )


def _refuse_tables(model: BlockwiseModel, paths: Iterable[str]) -> None:
    """Refuse routers that look experts up by number, in a table of tokens for instance."""
    for path in paths:
        around = model.skeleton.get_submodule(path.rpartition(".")[0])
        for name, tensor in around.state_dict().items():
            if not tensor.is_floating_point():
                raise ModelError(
                    f"'{name}' beside the experts '{path}' of {type(model.skeleton).__name__} holds "
                    f"{tensor.dtype}, perhaps numbers of experts, which would change: expected a router that "
                    "computes a score for each expert; use another model, or prune single weights"
                )


def _path_of(block: str, linears: Mapping[str, Any]) -> str:
    paths = {linear.expert[0] for linear in linears.values() if linear.expert is not None}
    assert len(paths) <= 1, f"'{block}' has one set of experts"
    return next(iter(paths), "")


def fewer_experts(model: BlockwiseModel, n_left: int) -> FewerExperts:
    """Describe the model with fewer experts in each block.

    Args:
        model: The dense model.
        n_left: Number of experts that each block keeps.

    Raises:
        ModelError: No entry of its ``config.json`` gives it so many experts.
    """
    experts = experts_of(model)
    _refuse_unknown(model)
    content = without_further_layers(model, read_json(model.folder / "config.json"))
    entries = [*entries_of(content), *entries_of(model.config.to_dict())]
    dense = shapes_of(model.skeleton)
    gone = tuple(
        f"{path}.{number}." for path in experts.paths if path for number in range(n_left, experts.n_experts)
    )
    kept = {name: shape for name, shape in dense.items() if not name.startswith(gone)}
    for path in dict.fromkeys(
        path for path, value in entries if type(value) is int and value == experts.n_experts
    ):
        changed = with_entry(content, path, n_left)
        routers = _routers(model, experts, kept, builds(model, changed), n_left)
        if routers is not None:
            return FewerExperts(changed, routers)
    raise ModelError(
        f"no entry of {model.folder / 'config.json'} gives each block of {type(model.skeleton).__name__} "
        f"{n_left} instead of {experts.n_experts} experts and its router as many rows: use another model, or "
        "prune single weights"
    )


def _refuse_unknown(model: BlockwiseModel) -> None:
    """Refuse files with further experts: they would be as many as before.

    Raises:
        ModelError: They have.
    """
    left_out = set(further_layers(model))
    further = [name for name in model.checkpoint.unknown if "expert" in name and name not in left_out]
    if further:
        raise ModelError(
            f"{model.folder} holds experts that transformers does not load ('{further[0]}'), of which none "
            "can be removed: expected experts in the blocks only; use another model, or prune single weights"
        )


def _routers(
    model: BlockwiseModel, experts: Experts, kept: Shapes, found: Shapes | None, n_left: int
) -> dict[str, int] | None:
    """The tensors that a change made smaller; None if it did something else or did not reach every block."""
    if found is None or found.keys() != kept.keys():
        return None
    routers: dict[str, int] = {}
    for name, shape in kept.items():
        if found[name] == shape:
            continue
        axis = _smaller_axis(shape, found[name], experts.n_experts, n_left)
        if axis is None:
            return None
        routers[name] = axis
    outside = set(routers)
    for block, path in zip(model.block_names, experts.paths, strict=True):
        own = {name for name in outside if name.startswith(f"{block}.")}
        if bool(path) != bool(own) or any(name.startswith(f"{path}.") for name in own):
            return None
        outside -= own
    return None if outside else routers


def _smaller_axis(dense: Sequence[int], found: Sequence[int], n: int, n_left: int) -> int | None:
    """The one dimension in which shapes differ, if it counts experts."""
    if len(dense) != len(found):
        return None
    axes = [axis for axis, sizes in enumerate(zip(dense, found, strict=True)) if sizes[0] != sizes[1]]
    return axes[0] if len(axes) == 1 and (dense[axes[0]], found[axes[0]]) == (n, n_left) else None


def write_fewer_experts(folder: Path, model: BlockwiseModel, removed: Sequence[Collection[int]]) -> None:
    """Write a model without some of the experts of each block.

    The remaining experts get new numbers in the same order, and the router's rows go with the others.

    Args:
        folder: Folder to write to.
        model: The dense model.
        removed: Numbers of the experts to leave out, for each block; equally many for all that have any.

    Raises:
        ModelError: No configuration describes the model, or ``removed`` does not fit it.
    """
    experts = experts_of(model)
    kept = _kept(experts, removed)
    fewer = fewer_experts(model, len(next(each for each in kept if each)))
    writer = CheckpointWriter(folder, model.checkpoint, model.n_blocks)
    for index, path in enumerate(experts.paths):
        with model.block(index) as block:
            writer.write(index, _without(block.tensors, path, kept[index], fewer.routers))
    writer.finish(model.names_outside_blocks(), {"config.json": fewer.config}, further_layers(model))
    # Runs the code of its blocks, which refuses some numbers of experts.
    BlockwiseModel(folder, str(model.dtype).removeprefix("torch."))


def _kept(experts: Experts, removed: Sequence[Collection[int]]) -> list[list[int]]:
    """Numbers of the remaining experts of each block.

    Raises:
        ModelError: ``removed`` does not fit the model.
    """
    everything = range(experts.n_experts)
    fits = len(removed) == len(experts.paths) and all(
        set(gone) <= set(everything if path else ())
        for path, gone in zip(experts.paths, removed, strict=True)
    )
    kept = [
        [number for number in everything if path and number not in gone]
        for path, gone in zip(experts.paths, removed, strict=False)
    ]
    n_blocks = sum(map(bool, experts.paths))
    fits = fits and any(removed) and sum(map(bool, kept)) == n_blocks
    if not fits or len({len(each) for each in kept if each}) != 1:
        raise ModelError(
            f"the experts to remove do not fit the model: expected some of {experts.n_experts} experts, "
            f"equally many in each of {n_blocks} blocks. The decisions are not of one run of this model; "
            "fetch the result again"
        )
    return kept


def _without(
    tensors: Mapping[str, Tensor], path: str, kept: Sequence[int], routers: Mapping[str, int]
) -> dict[str, Tensor]:
    """The tensors of a block under the names that they have with fewer experts."""
    numbers = {old: new for new, old in enumerate(kept)}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if path and name.startswith(f"{path}."):
            number, _, rest = name.removeprefix(f"{path}.").partition(".")
            if not number.isdigit():
                found[name] = tensor
            elif int(number) in numbers:
                found[f"{path}.{numbers[int(number)]}.{rest}"] = tensor
        elif name in routers:
            rows = torch.tensor(kept, device=tensor.device)
            found[name] = tensor.index_select(routers[name], rows)
        else:
            found[name] = tensor
    return found
