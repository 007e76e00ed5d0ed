"""FedPrLLM, one-shot, in the most obvious way: the whole model in memory, forward hooks, masks, votes.

It knows transformers' own form of a model, fused experts included, and shares no code with the product, so
what both agree on was not decided by the same mistake.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.pytorch_utils import Conv1D

Add = Callable[[str, Tensor], None]
_EXPERT = re.compile(r"(.+)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class Whole:
    """A whole model in memory, as transformers has it.

    Args:
        folder: Model folder.
    """

    def __init__(self, folder: Path) -> None:
        # Experts compute one after the other, as in the walk: in one go, they round differently.
        config = AutoConfig.from_pretrained(folder)
        is_text = type(config) in AutoModelForCausalLM._model_mapping
        family = AutoModelForCausalLM if is_text else AutoModelForMultimodalLM
        model = family.from_pretrained(folder, experts_implementation="eager")
        self.model: Any = model.float().eval()
        self._modules = dict(self.model.named_modules())

    def is_transposed(self, name: str) -> bool:
        """Whether a weight is stored as [in, out]."""
        return isinstance(self._modules.get(name.removesuffix(".weight")), Conv1D)

    def matrix(self, name: str) -> Tensor:
        """A weight, [out, in], by the product's name: a view of the model's own tensor."""
        module = self._modules.get(name.removesuffix(".weight"))
        if module is not None:
            weight = module.weight.detach()
            return weight.T if isinstance(module, Conv1D) else weight
        path, number, part = _EXPERT.fullmatch(name).groups()
        return _of_expert(self._modules[path], int(number), part).detach()

    @torch.no_grad()
    def sums(self, names: Sequence[str], windows: Tensor) -> dict[str, Tensor]:
        """Sum of squares of each channel that weights read; nothing for an expert without tokens."""
        sums: dict[str, Tensor] = {}

        def add(name: str, inputs: Tensor) -> None:
            squares = inputs.reshape(-1, inputs.shape[-1]).float().norm(p=2, dim=0).double() ** 2
            sums[name] = sums.get(name, 0.0) + squares

        hooks = [
            self._modules[path].register_forward_pre_hook(hook, with_kwargs=True)
            for path, hook in self._hooks(names, add)
        ]
        for window in windows:
            self.model(input_ids=window[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        return sums

    def _hooks(self, names: Sequence[str], add: Add) -> Iterator[tuple[str, Callable[..., None]]]:
        fused = set()
        for name in names:
            path = name.removesuffix(".weight")
            if path in self._modules:
                yield path, lambda _, args, kwargs, name=name: add(name, (*args, *kwargs.values())[0])
            else:
                fused.add(_EXPERT.fullmatch(name)[1])
        for path in fused:
            yield (
                path,
                lambda module, args, kwargs, path=path: _observe(
                    path, module, (*args, *kwargs.values()), add
                ),
            )


def naive_votes(
    folder: Path, blocks: Sequence[Sequence[str]], participants: Sequence[Tensor], sparsity: float
) -> dict[str, Tensor]:
    """Number of participants that would prune each weight (Wanda, each row by itself), [out, in].

    Args:
        folder: Model folder.
        blocks: Names of the prunable weights, block by block.
        participants: Token windows of each.
        sparsity: Fraction of each row.
    """
    votes: dict[str, Tensor] = {}
    for windows in participants:
        whole = Whole(folder)  # pruned by this participant alone
        for names in blocks:
            sums = whole.sums(names, windows)
            for name in names:
                weight = whole.matrix(name)
                lowest = _lowest(name, weight, sums.get(name), sparsity)
                counts = votes.setdefault(name, torch.zeros(weight.shape, dtype=torch.int64))
                counts.scatter_add_(1, lowest, torch.ones_like(lowest))
                weight.scatter_(1, lowest, 0.0)
    return votes


def _lowest(name: str, weight: Tensor, squares: Tensor | None, sparsity: float) -> Tensor:
    if squares is None:
        assert _EXPERT.fullmatch(name), f"{name} was never called"
        squares = torch.ones(weight.shape[1], dtype=torch.float64)
    scores = weight.abs() * squares.sqrt().float()
    return scores.argsort(dim=1, stable=True)[:, : int(weight.shape[1] * sparsity)]


def _observe(path: str, module: Any, args: Any, add: Add) -> None:
    hidden, chosen = args[:2]
    for number in range(len(module.down_proj)):
        rows = (chosen == number).any(dim=1).nonzero()[:, 0]
        if not len(rows):
            continue
        inputs = hidden[rows]
        if module.has_gate:
            gate_up = module.gate_up_proj[number]
            both = inputs @ gate_up if module.is_transposed else nn.functional.linear(inputs, gate_up)
            inner = module._apply_gate(both + module.gate_up_proj_bias[number] if module.has_bias else both)
            add(f"{path}.{number}.gate_proj.weight", inputs)
        else:
            inner = module.act_fn(nn.functional.linear(inputs, module.up_proj[number]))
        add(f"{path}.{number}.up_proj.weight", inputs)
        add(f"{path}.{number}.down_proj.weight", inner)


def _of_expert(module: Any, number: int, part: str) -> Tensor:
    if part == "down_proj" or not module.has_gate:
        matrix = getattr(module, part)[number]
        return matrix.T if module.is_transposed else matrix
    both = module.gate_up_proj[number].T if module.is_transposed else module.gate_up_proj[number]
    if not module.is_concatenated:
        return both[::2] if part == "gate_proj" else both[1::2]
    half = len(both) // 2
    return both[:half] if part == "gate_proj" else both[half:]


def differences(folder: Path, participants: Sequence[Tensor], result: Any) -> list[str]:
    """How a one-shot run of the product differs from the naive one; empty if in nothing.

    Votes must be equal. In each matrix, exactly k weights are zero, none of them with fewer votes than a kept
    one, and every other bit of the model is what it was.
    """
    sparsity = result.config.sparsity
    whole, pruned = Whole(folder), Whole(result.model_dir)
    blocks = [list(block.linears) for block in result.record.blocks]
    expected = naive_votes(folder, blocks, participants, sparsity)
    found = [] if expected.keys() == result.votes.keys() else ["votes on other weights"]
    for name, votes in expected.items():
        own = result.votes[name]
        own = own.T if whole.is_transposed(name) else own
        if n := int((votes != own).sum()):
            found.append(f"{name}: {n} of {votes.numel()} votes differ")
        before, after = whole.matrix(name), pruned.matrix(name)
        found += _wrong_zeros(name, before, after, own, sparsity)
        before.zero_()
        after.zero_()
    left = pruned.model.state_dict()
    found += [f"{n}: changed" for n, t in whole.model.state_dict().items() if not torch.equal(t, left[n])]
    return found


def _wrong_zeros(name: str, before: Tensor, after: Tensor, votes: Tensor, sparsity: float) -> list[str]:
    zero = after == 0
    k = int(votes.numel() * sparsity)
    found = [] if int(zero.sum()) == k else [f"{name}: {int(zero.sum())} zeros, expected {k}"]
    if k and votes[zero].min() < votes[~zero].max():
        found.append(f"{name}: a weight was pruned that has fewer votes than one that was kept")
    if not torch.equal(before[~zero], after[~zero]):
        found.append(f"{name}: kept weights changed")
    return found
