"""Run a causal language model of any architecture block by block.

A skeleton of the model is built without weights. Its own forward pass is run with every block replaced by a
stand-in that records its arguments and passes the hidden states on. This reveals what each block is called
with (masks, rotary embeddings), whatever the architecture, so this module contains no code for any particular
one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from fedprllm.errors import ModelError
from fedprllm.models.block import Block, Channels, Hidden, Linear, return_freed_by
from fedprllm.models.channels import find_channels
from fedprllm.models.checkpoint import Checkpoint
from fedprllm.models.experts import UnfusedExperts, reaching_all_experts
from fedprllm.models.find import beside_text, find_blocks, find_linears, without
from fedprllm.models.guards import (
    coverage,
    coverage_notes,
    refuse_different_ties,
    refuse_dtypes,
    refuse_further_blocks,
    refuse_low_coverage,
    refuse_missing,
    refuse_structure,
)
from fedprllm.models.norms import InputNorm, input_norms, watching_norms
from fedprllm.models.observe import inputs_shared
from fedprllm.models.probe import (
    Returned,
    equal,
    failed,
    probe_blocks,
    refuse_changed,
    refuse_other_values,
    refuse_wrong_calls,
    replaced_forwards,
    text_dependent,
)
from fedprllm.models.skeleton import build_skeleton

__all__ = ["DTYPES", "BlockwiseModel"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _Traced:
    """How the Linears of a block are connected, by their paths inside the block.

    Attributes:
        first: The first Linear that reads the same input.
        norms: Path of the normalization before a Linear.
        channels: How a Linear's input channels can be removed.
    """

    first: dict[str, str]
    norms: dict[str, str]
    channels: dict[str, Channels]


class BlockwiseModel:
    """A causal language model that is held in memory one block at a time.

    Args:
        folder: Hugging Face folder with safetensors (see `fedprllm.models.source.resolve_model`).
        dtype: Precision of the forward passes, a key of `DTYPES`.
        device: Device of the forward passes.
        exclude: Names and patterns of Linears that stay dense (`fedprllm.models.find.excluded`).

    Raises:
        ModelError: The model has no decoder blocks with Linears, or blocks that cannot be run one by one, has
            experts that cannot be taken apart, is quantized, or lacks tensors in its checkpoint; or the
            device does not exist.

    Attributes:
        coverages: Share of each block's weight matrices that is prunable.
        experts: The modules of each block's experts, taken apart; an empty list if it has none.
    """

    def __init__(
        self, folder: Path, dtype: str = "float32", device: str = "cpu", exclude: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.dtype = DTYPES[dtype]
        self.device = _device(device)
        self.skeleton: PreTrainedModel = build_skeleton(folder, self.dtype).eval()
        self.config = self.skeleton.config
        prefix, blocks = find_blocks(self.skeleton)
        self._blocks = blocks
        self.block_names = [f"{prefix}.{index}" for index in range(len(blocks))]
        self.experts = [[m for m in block.modules() if isinstance(m, UnfusedExperts)] for block in blocks]
        refuse_structure(self.skeleton)
        self._contexts: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        for module in self.skeleton.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        probe = probe_blocks(self.skeleton, blocks)
        self._returned = probe.returned
        self.checkpoint = Checkpoint(folder, self.skeleton)
        refuse_missing(self.skeleton, self.checkpoint)
        refuse_further_blocks(self.skeleton, self.checkpoint, self.block_names)
        refuse_different_ties(self.skeleton, self.checkpoint)
        found = [
            probe.taking_part(block, find_linears(block, name))
            for name, block in zip(self.block_names, blocks, strict=True)
        ]
        for name, block, linears in zip(self.block_names, blocks, found, strict=True):
            refuse_low_coverage(self.skeleton, name, coverage(block, linears))
        self.linears = self._described(without(found, exclude))
        self.coverages = [coverage(*each) for each in zip(blocks, self.linears, strict=True)]

    def _described(self, found: list[dict[str, Linear]]) -> list[dict[str, Linear]]:
        """The prunable weights of every block, with their stored precision and shared inputs."""
        dtypes = self.checkpoint.dtypes(name for of_block in found for name in of_block)
        refuse_dtypes(self.skeleton, self.folder, dtypes)
        sources, norms, channels = self._trace_inputs(found)
        return [
            {
                name: replace(
                    linear,
                    dtype=dtypes[name],
                    source=sources[name],
                    norm=norms.get(name),
                    channels=channels.get(name),
                )
                for name, linear in of_block.items()
            }
            for of_block in found
        ]

    def _trace_inputs(
        self, found: list[dict[str, Linear]]
    ) -> tuple[dict[str, str], dict[str, nn.Module], dict[str, Channels]]:
        """Map every Linear to the first of its block with the same input, to its norm and its channels.

        One block of each distinct structure is run on two tokens with zeros for weights, because only the
        code of the block determines which Linears receive the same tensor. Nothing is read from the
        checkpoint.
        """
        by_structure: dict[tuple[Any, ...], _Traced] = {}
        sources: dict[str, str] = {}
        norms: dict[str, nn.Module] = {}
        channels: dict[str, Channels] = {}
        with self._hollow(self.skeleton.base_model, outside_only=True):
            hidden = self._embed_one(torch.zeros(2, dtype=torch.int64))
        for index, linears in enumerate(found):
            shapes = tuple((linear.path, linear.shape) for linear in linears.values())
            structure = (type(self._blocks[index]), shapes)
            if structure not in by_structure:
                by_structure[structure] = self._trace_block(index, linears, hidden)
            traced = by_structure[structure]
            names = {linear.path: name for name, linear in linears.items()}
            sources |= {name: names[traced.first[linear.path]] for name, linear in linears.items()}
            norms |= {
                names[path]: self._blocks[index].get_submodule(norm) for path, norm in traced.norms.items()
            }
            channels |= {names[path]: each.renamed(names) for path, each in traced.channels.items()}
        self._contexts.clear()
        return sources, norms, channels

    def _trace_block(self, index: int, linears: dict[str, Linear], hidden: Hidden) -> _Traced:
        """Find out how the Linears of a block are connected."""
        module = self._blocks[index]
        args, kwargs = self._contexts[hidden.shape[1]][index]
        with self._hollow(module), reaching_all_experts(module), watching_norms(module, linears) as norms:
            first = inputs_shared(Block(index, linears, {}, self._call_block), hidden)
        # A weight of zero would silence what comes before a normalization.
        with self._hollow(module, value=1.0):
            found = find_channels(
                linears, lambda states: module(states, *args, **kwargs), hidden, self._n_heads
            )
        paths = {id(part): path for path, part in module.named_modules()}
        return _Traced(
            first,
            {linears[name].path: paths[id(norm)] for name, norm in norms.items()},
            {
                linears[name].path: each.renamed({other: linears[other].path for other in linears})
                for name, each in found.items()
            },
        )

    @property
    def _n_heads(self) -> int:
        """Number of query heads of each block; 0 if the configuration does not say."""
        found = getattr(self.config.get_text_config(), "num_attention_heads", 0)
        return found if isinstance(found, int) else 0

    # --- Properties of the model ---

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks)

    @property
    def n_prunable(self) -> int:
        """Number of prunable weights: those of all Linears inside the blocks."""
        return sum(linear.n_weights for of_block in self.linears for linear in of_block.values())

    @property
    def coverage(self) -> float:
        """Share of the weight matrices inside the blocks that is prunable."""
        prunable = [sum(linear.n_weights for linear in of_block.values()) for of_block in self.linears]
        return self.n_prunable / sum(n / share for n, share in zip(prunable, self.coverages, strict=True))

    @property
    def max_window_length(self) -> int | None:
        """Largest number of tokens in a forward pass; None if the configuration does not say."""
        text_config = self.config.get_text_config()
        return getattr(text_config, "max_position_embeddings", None) or getattr(
            text_config, "n_positions", None
        )

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids: the rows of the embedding."""
        return int(self.skeleton.get_input_embeddings().weight.shape[0])

    def names_outside_blocks(self) -> list[str]:
        """Names of the checkpoint's tensors outside all blocks; tied tensors appear under the stored name."""
        inside = tuple(f"{name}." for name in self.block_names)
        outside = [name for name in self.skeleton.state_dict() if not name.startswith(inside)]
        return [name for name in outside if name in self.checkpoint]

    def vectors_after_blocks(self) -> list[str]:
        """Names of the vectors outside the blocks with which logits are computed: a norm's, a head's bias.

        A pass with ones for weights tells them from what is used before the blocks.
        """
        state = self.skeleton.state_dict(keep_vars=True)
        names = [name for name in self.names_outside_blocks() if state[name].ndim == 1]
        tokens = torch.zeros(2, dtype=torch.int64)
        with self._hollow(self.skeleton, outside_only=True, value=1.0), torch.enable_grad():
            hidden = self._embed_one(tokens)
            values = [torch.ones_like(state[name], device=self.device).requires_grad_() for name in names]
            parameters = dict(zip(names, values, strict=True))
            total = torch.stack([logits.sum() for logits in self.logits(hidden, tokens, 2, parameters)]).sum()
            found = torch.autograd.grad(total, values, allow_unused=True) if total.requires_grad else ()
        self._contexts.clear()
        return [name for name, gradient in zip(names, found, strict=False) if gradient is not None]

    def names_in_block(self, index: int) -> list[str]:
        """Names of a block's tensors."""
        return [f"{self.block_names[index]}.{name}" for name in self._blocks[index].state_dict()]

    # --- Loading and releasing ---

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """Load one block, and release it when the ``with`` block ends."""
        module, linears = self._blocks[index], self.linears[index]
        return_freed_by(linears)
        loaded = self.checkpoint.load(self.names_in_block(index)).items()
        tensors = {name: t.to(self.device) for name, t in loaded}
        del loaded
        with self._materialized(tensors), ExitStack() as stack:
            # A caller may still hold the block while it loads the next one.
            stack.callback(tensors.clear)
            share = self.coverages[index]
            notes = coverage_notes(module, linears, share)
            yield Block(index, linears, tensors, self._call_block, share, notes, self.experts[index])

    def input_norms(self, index: int) -> dict[str, InputNorm]:
        """The normalizations of a block's inputs (see `fedprllm.models.norms.input_norms`).

        Only their own weights are read from the checkpoint.
        """
        used = {id(linear.norm) for linear in self.linears[index].values()}
        names = [
            f"{self.block_names[index]}.{path}.{name}"
            for path, module in self._blocks[index].named_modules()
            if id(module) in used
            for name in module.state_dict()
        ]
        tensors = {name: t.to(self.device) for name, t in self.checkpoint.load(names).items()}
        with self._materialized(tensors):
            return input_norms(self.linears[index])

    @contextmanager
    def _outside_blocks(self, part: nn.Module) -> Iterator[None]:
        """Hold in memory the tensors that a part of the model has outside the blocks, for text alone.

        What text does not reach is NaN, which takes no memory and would show wherever it did.
        """
        used = {id(tensor) for tensor in part.state_dict(keep_vars=True).values()}
        beside = beside_text(self.skeleton)
        state = self.skeleton.state_dict(keep_vars=True)
        names = [name for name in self.names_outside_blocks() if id(state[name]) in used]
        text = [name for name in names if id(state[name]) not in beside]
        tensors = {name: t.to(self.device) for name, t in self.checkpoint.load(text).items()}
        parameters = dict(self.skeleton.named_parameters(remove_duplicate=False))
        for name in set(names) - set(text):
            if (parameter := parameters.get(name)) is not None:
                nan = torch.full((), float("nan"), dtype=parameter.dtype, device=self.device)
                tensors[name] = nan.expand(parameter.shape)
        with self._materialized(tensors):
            yield

    @contextmanager
    def _hollow(self, part: nn.Module, *, outside_only: bool = False, value: float = 0.0) -> Iterator[None]:
        """Let a part of the model compute with weights of one value, which take no memory."""
        used = {id(parameter) for parameter in part.parameters()}
        inside = tuple(f"{name}." for name in self.block_names)
        zeros = {
            name: torch.full((), value, dtype=parameter.dtype, device=self.device).expand(parameter.shape)
            for name, parameter in self.skeleton.named_parameters()
            if id(parameter) in used and not (outside_only and name.startswith(inside))
        }
        with self._materialized(zeros):
            yield

    @contextmanager
    def _materialized(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the skeleton's parameters values inside the ``with`` block; buffers keep theirs afterwards."""
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.skeleton.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((module, leaf))
        parameters = dict(self.skeleton.named_parameters(remove_duplicate=False))
        buffers = dict(self.skeleton.named_buffers())
        with ExitStack() as stack:
            for name, tensor in tensors.items():
                if name in buffers:
                    buffers[name].copy_(tensor)
                    continue
                empty = parameters[name]
                real = nn.Parameter(tensor.to(empty.dtype), requires_grad=False)
                # Tied weights are one parameter in several places.
                for module, leaf in places[id(empty)]:
                    module._parameters[leaf] = real
                    stack.callback(module._parameters.__setitem__, leaf, empty)
            yield

    # --- Computing ---

    def embed(self, windows: Iterable[Int[Tensor, " tokens"]]) -> Iterator[Hidden]:
        """Yield the inputs of the first block, one window at a time; then release the embedding."""
        with self._outside_blocks(self.skeleton.base_model):
            for window in windows:
                yield self._embed_one(window)

    @torch.no_grad()
    def _embed_one(self, window: Int[Tensor, " tokens"]) -> Hidden:
        base = self.skeleton.base_model
        n_tokens = window.shape[0]
        called: list[int] = []
        seen: list[tuple[tuple[Any, ...], dict[str, Any], Hidden]] = []

        def record(index: int, hidden: Hidden, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hidden:
            if seen:
                refuse_changed(self.skeleton, index, hidden, seen[0][2])
            refuse_other_values(self.skeleton, index, (args, kwargs))
            called.append(index)
            seen.append((args, kwargs, hidden))
            return seen[0][2]

        with self._stand_ins(record):
            try:
                base(input_ids=window[None].to(self.device), use_cache=False)
            except ModelError:
                raise
            except Exception as error:  # from the model's own code
                raise failed(self.skeleton, error) from error
        refuse_wrong_calls(self.skeleton, called, self.n_blocks)
        contexts = [(args, kwargs) for args, kwargs, _ in seen]
        known = self._contexts.setdefault(n_tokens, contexts)
        for index, pair in enumerate(zip(known, contexts, strict=True)):
            if known is not contexts and not equal(*pair):
                raise text_dependent(self.skeleton, index)
        return seen[0][2]

    @torch.no_grad()
    def _call_block(self, index: int, hidden: Hidden) -> Hidden:
        return self.run_block(index, hidden)

    def run_block(
        self, index: int, hidden: Hidden, parameters: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Hidden:
        """Compute a block's output for one window, with other parameters, so that gradients can be taken.

        Call this while the block is in memory, on windows of a length that has been embedded.

        Args:
            index: Index of the block.
            hidden: Its input.
            parameters: Tensors that replace parameters, by their names inside the block.
        """
        args, kwargs = self._contexts[hidden.shape[1]][index]
        output = _called(self._blocks[index], parameters, (hidden, *args), kwargs)
        result: Tensor = Returned.hidden(output)
        return result

    @torch.no_grad()
    def token_losses(
        self, hidden: Hidden, window: Int[Tensor, " tokens"], chunk: int = 512
    ) -> Float[Tensor, " predicted"]:
        """Negative log-likelihood, in nats, of all tokens of a window but the first.

        Call this inside `head`.

        Args:
            hidden: Output of the last block for the window.
            window: Token ids.
            chunk: Number of positions whose logits are computed at a time: logits of 2048 positions with a
                vocabulary of 262,144 would take 2 GB.
        """
        next_tokens = torch.split(window[1:].to(self.device), self._chunk(chunk, window))
        chunks = self.logits(hidden, window, chunk)
        losses = [
            nn.functional.cross_entropy(logits, tokens, reduction="none")
            for logits, tokens in zip(chunks, next_tokens, strict=True)
        ]
        return torch.cat(losses)

    def logits(
        self,
        hidden: Hidden,
        window: Int[Tensor, " tokens"],
        chunk: int = 512,
        parameters: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Iterator[Float[Tensor, "positions vocabulary"]]:
        """Yield the logits of all positions of a window but the last, a chunk of positions at a time.

        Call this inside `head`.

        Args:
            hidden: Output of the last block for the window.
            window: Token ids.
            chunk: As in `token_losses`.
            parameters: Tensors that replace parameters outside the blocks, by name.
        """
        window = window.to(self.device)
        n_predicted, step = window.shape[0] - 1, self._chunk(chunk, window)
        with self._stand_ins(lambda *_: hidden):
            for start in range(0, n_predicted, step):
                positions = torch.arange(start, min(start + step, n_predicted), device=self.device)
                kept = {"logits_to_keep": positions} if self._accepts_chunks else {}
                inputs = {"input_ids": window[None], "use_cache": False, **kept}
                output = _called(self.skeleton, parameters, (), inputs)
                yield output.logits[0, : positions.numel()].to(torch.float32)

    @property
    def _accepts_chunks(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.skeleton.forward).parameters

    def _chunk(self, chunk: int, window: Tensor) -> int:
        return chunk if self._accepts_chunks else len(window) - 1

    @contextmanager
    def head(self) -> Iterator[None]:
        """Hold the embedding, final norm and head in memory for `token_losses`."""
        with self._outside_blocks(self.skeleton):
            yield

    @contextmanager
    def _stand_ins(
        self, function: Callable[[int, Hidden, tuple[Any, ...], dict[str, Any]], Hidden]
    ) -> Iterator[None]:
        """Replace the ``forward`` of every block with ``function(index, hidden, args, kwargs)``."""

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                return self._returned[index].wrap(function(index, hidden, rest, kwargs))

            return forward

        with replaced_forwards({block: stand_in(index) for index, block in enumerate(self._blocks)}):
            yield


def _called(
    module: nn.Module, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module with other parameters. Without any, nothing is looked up, which takes time."""
    return functional_call(module, dict(parameters), args, kwargs) if parameters else module(*args, **kwargs)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ModelError(
            f"cannot compute on device '{name}': {reason}. Choose another device; 'cpu' always works"
        ) from None
    return device
