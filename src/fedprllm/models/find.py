"""Find a model's decoder blocks and their Linears, whatever the architecture calls them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedprllm.errors import ModelError
from fedprllm.models.block import Linear
from fedprllm.models.experts import UnfusedExperts

__all__ = ["beside_text", "find_blocks", "find_linears", "is_linear", "without"]

_N_EXPERTS = ("num_experts", "moe_num_experts", "n_experts", "num_local_experts")
_ROUTER = re.compile(r"(^|[._])(router|gate|gating|wg)($|\.)")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a Linear; GPT-2's Conv1D is one that stores its weight transposed."""
    return isinstance(module, (nn.Linear, Conv1D))


def find_blocks(skeleton: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Find the outermost module list with the most parameters in which every module contains Linears.

    The text decoder of a multimodal model comes first, however large its vision tower is.

    Returns:
        The name of the list and its modules.

    Raises:
        ModelError: The model has no such list.
    """
    decoder = skeleton.get_decoder()
    inside = set(map(id, decoder.modules())) if isinstance(decoder, nn.Module) else set()
    lists = _lists_of_blocks(skeleton)
    found = [one for one in lists if id(one[1]) in inside] or lists
    if not found:
        raise ModelError(
            f"{type(skeleton).__name__} has no decoder blocks: expected a list of modules that contain "
            "Linear layers; use another model"
        )
    name, blocks = max(found, key=lambda one: sum(parameter.numel() for parameter in one[1].parameters()))
    return name, list(blocks)


def beside_text(skeleton: PreTrainedModel) -> set[int]:
    """Ids of the tensors that text alone does not reach: a multimodal model's towers and their projectors.

    These are the tensors of the model around the text decoder. The head lies outside both.
    """
    decoder, around = skeleton.get_decoder(), skeleton.base_model
    if not isinstance(decoder, nn.Module) or decoder is around or decoder not in around.modules():
        return set()
    text = [decoder, skeleton.get_input_embeddings()]
    return _tensor_ids(around) - {one for part in text for one in _tensor_ids(part)}


def _tensor_ids(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}


def _lists_of_blocks(skeleton: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The module lists in which every module contains Linears, and that lie in no other such list."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in skeleton.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        if len(module) and all(any(map(is_linear, block.modules())) for block in module):
            found.append((name, module))
    return found


def find_linears(block: nn.Module, prefix: str) -> dict[str, Linear]:
    """Every Linear of a block by the name of its weight; ``source`` is still each Linear's own name.

    Routers, which choose the experts for each token, are left out: they are small, and a pruned one sends
    tokens to other experts.
    """
    linears = {}
    experts = _paths_of_experts(block)
    for path, module in block.named_modules():
        around = next((one for one in experts if path.startswith(f"{one}.")), None)
        if is_linear(module) and (around is not None or not _is_router(block, path)):
            transposed = isinstance(module, Conv1D)
            shape = tuple(module.weight.T.shape if transposed else module.weight.shape)
            name = f"{prefix}.{path}.weight"
            dtype, family = module.weight.dtype, "" if around is None else _family(name, f"{prefix}.{around}")
            linears[name] = Linear(
                name, path, (shape[0], shape[1]), transposed, dtype, name, module, family=family
            )
    return linears


def without(found: Sequence[dict[str, Linear]], patterns: Sequence[str]) -> list[dict[str, Linear]]:
    """Leave out the Linears that are to stay dense.

    Args:
        found: The Linears of every block, by the name of the weight.
        patterns: Names of Linears, or patterns in which ``*`` stands for anything, as in file names. Each is
            compared with the name in the model (``model.layers.3.mlp.down_proj``) and with that inside the
            block (``mlp.down_proj``).

    Raises:
        ModelError: A pattern matches no Linear, or a block would keep none to prune.
    """
    unused = set(patterns)
    kept: list[dict[str, Linear]] = []
    for linears in found:
        kept.append({})
        for name, linear in linears.items():
            names = (name, name.removesuffix(".weight"), linear.path)
            matching = {p for p in patterns if any(fnmatchcase(each, p) for each in names)}
            unused -= matching
            if not matching:
                kept[-1][name] = linear
    example = next(iter(found[0].values())).path
    for pattern in patterns:
        if pattern in unused:
            raise ModelError(
                f"exclude '{pattern}' matches no Linear of the blocks: expected a name or a pattern such as "
                f"'{example}' or '*.{example.rpartition('.')[2]}'"
            )
    for index, linears in enumerate(kept):
        if not linears:
            raise ModelError(
                f"exclude leaves nothing to prune in block {index}: expected at least one Linear in every "
                "block"
            )
    return kept


def _paths_of_experts(block: nn.Module) -> list[str]:
    """Paths of the modules whose children are experts, one beside the other."""
    return [
        path
        for path, module in block.named_modules()
        if isinstance(module, UnfusedExperts)
        or (
            isinstance(module, (nn.ModuleList, nn.ModuleDict))
            and _are_experts(path.rpartition(".")[2], module)
        )
    ]


def _family(name: str, experts: str) -> str:
    """The name of an expert's weight with a star in place of the expert."""
    return f"{experts}.*.{name.removeprefix(f'{experts}.').partition('.')[2]}"


def _is_router(block: nn.Module, path: str) -> bool:
    """Whether a Linear lies beside experts and chooses among them.

    Beside means in the same module or, if the router is a module of its own, in the module around that.
    Routers have one output per expert, or one for a shared expert, or are called so.
    """
    n_out = _n_outputs(block.get_submodule(path))
    around = path.split(".")[:-1]
    for depth in range(len(around), max(len(around) - 2, -1), -1):
        parent = block.get_submodule(".".join(around[:depth]))
        experts = {name: child for name, child in parent.named_children() if _are_experts(name, child)}
        if experts:
            part = path.split(".")[depth]
            inside = part in experts or ("expert" in part.lower() and not is_linear(getattr(parent, part)))
            counts = {1, *map(_n_experts, experts.values())}
            return not inside and (n_out in counts or _ROUTER.search(path.lower()) is not None)
    return False


def _n_outputs(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.shape[1 if isinstance(module, Conv1D) else 0])


def _are_experts(name: str, module: nn.Module) -> bool:
    """Whether a module is called so, or is a list of modules of one kind that contain Linears."""
    if "expert" in name.lower() and "shared" not in name.lower():
        return True
    if not isinstance(module, nn.ModuleList) or len(module) < 2 or len(set(map(type, module))) > 1:
        return False
    return not is_linear(module[0]) and any(map(is_linear, module[0].modules()))


def _n_experts(experts: nn.Module) -> int:
    """Number of experts: entries of a list, an attribute, or matrices of a fused tensor; 0 if unknown."""
    for module in (experts, *experts.children()):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return len(module)
        for name in _N_EXPERTS:
            if isinstance(getattr(module, name, None), int):
                return int(getattr(module, name))
    return next((p.shape[0] for p in experts.parameters() if p.ndim == 3), 0)
