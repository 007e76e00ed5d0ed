"""Find out, before a tensor is read, whether a model's blocks can be run one after another.

The walk gives each block its own input and the arguments that depend only on the number of tokens. A model
that does anything else would be pruned wrongly without any sign of it: blocks may hand each other keys and
values, the model may change hidden states between blocks, arguments may depend on the text. The model's own
forward pass is therefore run twice on a few tokens. Weights take no memory, Linears are replaced by a sum
over channels, and every block gets random numbers as input. Whatever reaches the output of a block by another
way than its input leaves a trace in the graph that autograd records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedprllm.errors import ModelError
from fedprllm.models.block import Linear
from fedprllm.models.experts import reaching_all_experts
from fedprllm.models.find import is_linear

__all__ = [
    "Probe",
    "Returned",
    "equal",
    "failed",
    "probe_blocks",
    "refuse_changed",
    "refuse_other_values",
    "refuse_wrong_calls",
    "replaced_forwards",
    "text_dependent",
]

_N_TOKENS = 2
_WEIGHT = 0.5
_ADVICE = "This architecture cannot be pruned block by block yet; use another model"


class _Other:
    """Stands for what a block returns besides hidden states; no block may be given it."""


_OTHER = _Other()


@dataclass(frozen=True)
class Returned:
    """How a block returns hidden states.

    Attributes:
        container: ``tuple`` or ``list`` if it returns several values, of which hidden states come first.
        n_others: Number of the other values.
    """

    container: type[Any] | None = None
    n_others: int = 0

    @classmethod
    def of(cls, output: Any) -> Returned:
        """The way in which a block returned ``output``."""
        if isinstance(output, (tuple, list)):
            return cls(list if isinstance(output, list) else tuple, len(output) - 1)
        return cls()

    def wrap(self, hidden: Tensor, others: Sequence[Any] | None = None) -> Any:
        """Return hidden states as the block does; by default, the other values must not be used."""
        if self.container is None:
            return hidden
        return self.container([hidden, *([_OTHER] * self.n_others if others is None else others)])

    @staticmethod
    def hidden(output: Any) -> Any:
        """The hidden states in what a block returned."""
        return output[0] if isinstance(output, (tuple, list)) and output else output


@dataclass
class Probe:
    """What the forward pass of a model showed.

    Attributes:
        returned: How each block returns its hidden states.
        called: Ids of the Linear modules that were called.
    """

    returned: list[Returned] = field(default_factory=list)
    called: set[int] = field(default_factory=set)

    def taking_part(self, block: nn.Module, linears: dict[str, Linear]) -> dict[str, Linear]:
        """The Linears of a block that its forward pass calls; the others have no input to be scored by.

        One expert of several may still be called by other text than the probe's.
        """
        lists = [p for p, part in block.named_modules() if isinstance(part, (nn.ModuleList, nn.ModuleDict))]
        return {
            name: linear
            for name, linear in linears.items()
            if id(linear.module) in self.called or linear.path.startswith(tuple(f"{path}." for path in lists))
        }


def probe_blocks(skeleton: PreTrainedModel, blocks: Sequence[nn.Module]) -> Probe:
    """Run the model's own forward pass without weights and check that its blocks can be run one by one.

    Args:
        skeleton: The model without weights, its buffers filled in.
        blocks: Its decoder blocks.

    Raises:
        ModelError: They cannot; the message says why.
    """
    run = _Run(skeleton, blocks)
    n_ids = int(skeleton.get_input_embeddings().weight.shape[0])
    passes = [_tokens(start, n_ids) for start in (n_ids // 2, n_ids // 3)]
    with run.prepared(), torch.enable_grad():
        arguments = [run.forward(tokens) for tokens in passes]
    for index, (one, other) in enumerate(zip(*arguments, strict=True)):
        if not equal(one, other):
            raise text_dependent(skeleton, index)
    return run.found


def _tokens(start: int, n_ids: int) -> Tensor:
    return (start + torch.arange(_N_TOKENS)) % n_ids


def text_dependent(skeleton: nn.Module, index: int) -> ModelError:
    """The error about a block whose arguments depend on the text."""
    return ModelError(
        f"block {index} of {type(skeleton).__name__} takes arguments that depend on the text: expected "
        f"arguments that depend only on its length. {_ADVICE}"
    )


def failed(skeleton: nn.Module, error: Exception) -> ModelError:
    """The error about a forward pass that does not work with single blocks."""
    reason = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
    return ModelError(
        f"the forward pass of {type(skeleton).__name__} cannot be taken apart into its blocks "
        f"({type(error).__name__}: {reason}). {_ADVICE}"
    )


def refuse_other_values(skeleton: nn.Module, index: int, arguments: Any) -> None:
    """Refuse a block that is given what an earlier block returned besides hidden states.

    Raises:
        ModelError: It is.
    """
    if any(value is _OTHER for value in _flat(arguments)):
        raise _reads_another_block(skeleton, index)


def refuse_wrong_calls(skeleton: nn.Module, called: Sequence[int], n_blocks: int) -> None:
    """Refuse a forward pass that did not call every block once and in order.

    Raises:
        ModelError: It did not.
    """
    if list(called) != list(range(n_blocks)):
        order = ", ".join(map(str, called)) or "none"
        raise ModelError(
            f"the forward pass of {type(skeleton).__name__} called the blocks {order}: expected one call for "
            f"each, in order. {_ADVICE}"
        )


def refuse_changed(skeleton: nn.Module, index: int, hidden: Tensor, returned: Tensor) -> None:
    """Refuse a model that changes hidden states between two blocks.

    Raises:
        ModelError: The input of the block is not what the previous block returned.
    """
    if hidden.shape != returned.shape or not torch.equal(hidden, returned):
        raise ModelError(
            f"{type(skeleton).__name__} changes the hidden states between blocks {index - 1} and {index}: "
            f"expected each block to receive what the previous one returned. {_ADVICE}"
        )


def _reads_another_block(skeleton: nn.Module, index: int) -> ModelError:
    return ModelError(
        f"block {index} of {type(skeleton).__name__} reads what another block computed, besides the hidden "
        "states (such as shared keys and values): expected blocks that only pass on hidden states. "
        f"{_ADVICE}"
    )


def _leaves_something(skeleton: nn.Module, index: int) -> ModelError:
    return ModelError(
        f"block {index} of {type(skeleton).__name__} leaves something for other blocks in its arguments "
        f"(such as shared keys and values): expected blocks that only pass on hidden states. {_ADVICE}"
    )


class _Run:
    """Forward passes of a model whose weights, Linears and hidden states are stand-ins."""

    def __init__(self, skeleton: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
        self.skeleton, self.blocks = skeleton, blocks
        self.found = Probe()
        self._random = torch.Generator().manual_seed(0)
        # Leaves of the graph that belong to a block: its parameters and all hidden states.
        self._owners: dict[int, int | None] = {}
        self._kept: list[Tensor] = []

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Give the model stand-ins for weights and Linears inside the ``with`` block."""
        embedding: Any = self.skeleton.get_input_embeddings()
        weights = {
            id(parameter): _stand_in(parameter, rows=parameter is embedding.weight)
            for parameter in self.skeleton.base_model.parameters()
        }
        linears = [module for block in self.blocks for module in block.modules() if is_linear(module)]
        functions = {module: self._linear(module) for module in linears}
        with (
            _filled(self.skeleton, weights),
            replaced_forwards(functions),
            reaching_all_experts(self.skeleton),
        ):
            for index, block in enumerate(self.blocks):
                self._owners |= dict.fromkeys(map(id, block.parameters()), index)
            self._embedding = embedding.weight
            yield

    def _linear(self, module: Any) -> Callable[..., Tensor]:
        n_out = module.weight.shape[1 if not isinstance(module, nn.Linear) else 0]
        original = module.forward

        def forward(inputs: Tensor, *rest: Any, **more: Any) -> Any:
            self.found.called.add(id(module))
            if type(module).forward is not nn.Linear.forward and isinstance(module, nn.Linear):
                # A router may be a Linear that returns its choice.
                return original(inputs, *rest, **more)
            # A copy, because some blocks go on in place.
            return inputs.sum(-1, keepdim=True).expand(*inputs.shape[:-1], n_out).clone()

        return forward

    def _leaf(self, like: Tensor, owner: int | None) -> Tensor:
        """Random hidden states that the graph remembers."""
        values = torch.randn(like.shape, generator=self._random).to(like)
        leaf = values.detach().requires_grad_()
        self._kept.append(leaf)
        self._owners[id(leaf)] = owner
        return leaf

    def forward(self, tokens: Tensor) -> list[Any]:
        """Run the whole model on a window and return the arguments of every block."""
        one_pass = _Pass(self)
        originals = [block.forward for block in self.blocks]
        stand_ins = {
            block: one_pass.stand_in(index, original)
            for index, (block, original) in enumerate(zip(self.blocks, originals, strict=True))
        }
        try:
            with replaced_forwards(stand_ins):
                output = self.skeleton.base_model(
                    input_ids=tokens[None].to(self._embedding.device), use_cache=False
                )
        except ModelError:
            raise
        except Exception as error:  # from the model's own code, which may do anything
            raise failed(self.skeleton, error) from error
        refuse_wrong_calls(self.skeleton, one_pass.called, len(self.blocks))
        self._check_end(output, one_pass)
        return one_pass.arguments

    def _check_end(self, output: Any, one_pass: _Pass) -> None:
        """Check that only the last block's output goes on to the head."""
        last = one_pass.returned
        foreign = {id(leaf) for leaf in self._kept if leaf is not last}
        if isinstance(output[0], Tensor) and foreign & set(_leaves([output[0]])):
            raise ModelError(
                f"{type(self.skeleton).__name__} combines the outputs of several blocks: expected only the "
                f"last block's output to reach the head. {_ADVICE}"
            )

    def check(self, index: int, arguments: Any, hidden: Tensor, output: Tensor) -> None:
        """Check that nothing but its own input, weights and harmless arguments affects a block's output."""
        if id(self._embedding) in _leaves(
            tensor for tensor in _flat(arguments) if isinstance(tensor, Tensor)
        ):
            raise text_dependent(self.skeleton, index)
        for leaf in _leaves([output]):
            if leaf in self._owners and self._owners[leaf] != index and leaf != id(hidden):
                raise _reads_another_block(self.skeleton, index)


class _Pass:
    """One forward pass; `stand_in` makes the functions that replace the blocks' own."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self.called: list[int] = []
        self.arguments: list[Any] = []
        self.returned: Tensor | None = None

    def stand_in(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """Run a block on random numbers, check what it does, and return other random numbers."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            self.called.append(index)
            refuse_wrong_calls(self._run.skeleton, self.called, len(self.called))
            self._check_length(hidden)
            if self.returned is not None:
                refuse_changed(self._run.skeleton, index, hidden, self.returned)
            leaf = self._run._leaf(hidden, None)
            before = _snapshot((rest, kwargs))
            output = original(leaf.clone(), *rest, **kwargs)
            if _snapshot((rest, kwargs)) != before:
                raise _leaves_something(self._run.skeleton, index)
            self.arguments.append((rest, kwargs))
            self._check(index, leaf, output)
            self.returned = self._run._leaf(hidden, -1)
            others = output[1:] if isinstance(output, (tuple, list)) else ()
            return Returned.of(output).wrap(self.returned, others)

        return forward

    def _check_length(self, hidden: Tensor) -> None:
        if hidden.ndim != 3 or hidden.shape[:2] != (1, _N_TOKENS):
            raise ModelError(
                f"the blocks of {type(self._run.skeleton).__name__} receive hidden states of shape "
                f"{tuple(hidden.shape)} for {_N_TOKENS} tokens: expected (1, {_N_TOKENS}, width). {_ADVICE}"
            )

    def _check(self, index: int, leaf: Tensor, output: Any) -> None:
        result = Returned.hidden(output)
        if not isinstance(result, Tensor) or result.shape != leaf.shape:
            raise ModelError(
                f"block {index} of {type(self._run.skeleton).__name__} does not return hidden states of the "
                f"shape it receives, {tuple(leaf.shape)}. {_ADVICE}"
            )
        self._run.check(index, self.arguments[-1], leaf, result)
        if len(self._run.found.returned) == index:
            self._run.found.returned.append(Returned.of(output))


def _stand_in(parameter: Tensor, *, rows: bool) -> Tensor:
    """A weight that takes no memory; an embedding still differs from token to token."""
    if rows:
        values = torch.arange(parameter.shape[0], dtype=torch.float32) % 7 + 1
        return values.to(parameter.dtype)[:, None].expand(parameter.shape)
    return torch.full((), _WEIGHT).to(parameter.dtype).expand(parameter.shape)


@contextmanager
def _filled(skeleton: nn.Module, values: Mapping[int, Tensor]) -> Iterator[None]:
    """Give parameters, by id, values of which autograd keeps track inside the ``with`` block."""
    device = next((b.device for b in skeleton.buffers() if b.device.type != "meta"), torch.device("cpu"))
    made = {
        key: nn.Parameter(value.to(device), requires_grad=value.is_floating_point())
        for key, value in values.items()
    }
    with ExitStack() as stack:
        for module in skeleton.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in made:
                    module._parameters[leaf] = made[id(parameter)]
                    stack.callback(module._parameters.__setitem__, leaf, parameter)
        yield


@contextmanager
def replaced_forwards(functions: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Replace the ``forward`` of modules inside the ``with`` block.

    Only ``forward`` is replaced, because some architectures read attributes of the module itself.
    """
    with ExitStack() as stack:
        for module, function in functions.items():
            module.forward = function
            stack.callback(delattr, module, "forward")
        yield


def _leaves(tensors: Any) -> set[int]:
    """Ids of the leaves of the graph that tensors were computed from."""
    found: set[int] = set()
    seen: set[Any] = set()
    todo = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            todo.append(tensor.grad_fn)
        elif tensor.requires_grad:
            found.add(id(tensor))
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo.extend(following for following, _ in node.next_functions)
    return found


def _flat(value: Any) -> Iterator[Any]:
    """Everything in nested collections."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _snapshot(value: Any) -> Any:
    """What changes if somebody writes to nested arguments."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, (Mapping, MutableMapping)):
        return [(key, _snapshot(part)) for key, part in value.items()]
    if isinstance(value, (tuple, MutableSequence)):
        return [_snapshot(part) for part in value]
    state = getattr(value, "__dict__", None)
    if state is not None and not isinstance(value, (nn.Module, type)) and not callable(value):
        return id(value), [(key, id(part)) for key, part in state.items()]
    return id(value)


def equal(left: Any, right: Any) -> bool:
    """Whether two nested collections hold equal tensors and values."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.shape == right.shape and _same_values(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(equal, left, right))
    return left is right or left == right


def _same_values(left: Tensor, right: Tensor) -> bool:
    if torch.equal(left, right):
        return True
    return left.is_floating_point() and bool(torch.isclose(left, right, rtol=0, atol=0, equal_nan=True).all())
