"""Dry run: compute and show the updates a participant would send, without any connection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedprllm.errors import ConfigError
from fedprllm.federation.plan import RunPlan, SiteSettings

__all__ = ["Preview", "TensorPreview", "dry_run"]

_ROWS, _COLUMNS = 4, 48


@dataclass(frozen=True)
class TensorPreview:
    """One tensor of an update.

    Attributes:
        name: Name of the Linear inside its block, as in the message.
        shape: Shape of the tensor.
        dtype: Data type of its values.
        payload_bytes: Length of its values in the message, in bytes.
        rows: Beginnings of its first rows, as they would be sent. In a mask, ``#`` is a weight to prune and
            ``.`` one to keep. Other kinds show numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    payload_bytes: int
    rows: list[str]


@dataclass(frozen=True)
class Preview:
    """The update of one block.

    Attributes:
        block: Index of the decoder layer.
        n_blocks: Number of blocks in the model.
        kind: Kind of the update.
        n_tokens: Number of tokens the update is computed from, which is part of the message.
        message_bytes: Length of the whole message in bytes.
        tensors: All tensors in the update.
        step: What ``block`` and ``n_blocks`` count: blocks, or rounds of healing.
    """

    block: int
    n_blocks: int
    kind: str
    n_tokens: int
    message_bytes: int
    tensors: list[TensorPreview]
    step: str = "block"


def dry_run(settings: SiteSettings, plan: RunPlan, name: str, n_blocks: int = 1) -> Iterator[Preview]:
    """Compute the updates of the first blocks exactly as in a run, and decode them from their messages.

    Blocks after the first are computed from the participant's own decisions, or from the unpruned blocks if
    it makes none. In an iterative run they would follow the coordinator's decisions. Allocation and layer
    sampling depend on all participants, so every block is shown at the sparsity of the model.

    Args:
        settings: The participant's own settings.
        plan: The run.
        name: Name of the participant.
        n_blocks: Number of blocks to compute.

    Yields:
        The update of each block.

    Raises:
        ConfigError: The run asks for a kind of update that may not be sent.
        DataError: The text cannot be used.
        ModelError: The model cannot be used.
    """
    from fedprllm.federation.protocol import update as wire
    from fedprllm.federation.protocol.names import to_wire
    from fedprllm.models.blockwise import BlockwiseModel
    from fedprllm.models.source import resolve_model
    from fedprllm.pruning.inputs import make_participants, say_notes
    from fedprllm.pruning.method import pruning_method
    from fedprllm.pruning.walk import Walker

    refused = [kind for kind in plan.kinds if kind not in settings.allow]
    if refused:
        raise ConfigError(
            f"the run asks for {', '.join(refused)}, and {', '.join(settings.allow)} may be sent (--allow): "
            "it would be refused; repeat --allow for every kind that you allow"
        )
    if plan.healing is not None:
        yield _first_round(settings, plan, name)
        return
    alone = {"device": settings.device or "cpu", "strategy": "one-shot"}
    config = plan.config.model_copy(update=alone)
    model = BlockwiseModel(
        resolve_model(settings.model or plan.model), config.dtype, config.device, config.exclude
    )
    (participant,), config = make_participants(model, {name: list(settings.data)}, config)
    say_notes([participant])
    walker = Walker(participant, pruning_method(config), model.n_blocks)
    walker.enter(model)
    for index in range(min(n_blocks, model.n_blocks)):
        with model.block(index) as block:
            contribution = walker.contribute(block)
            assert contribution.update is not None, "a dry run shows every block"
            update = wire.Update(
                run_id=bytes(16),
                participant=name,
                block=index,
                kind=config.share,
                model_fingerprint=bytes(32),
                tensors=to_wire(contribution.update, block.linears),
                n_tokens=participant.n_tokens,
            )
            message = wire.encode(update)
            yield _preview(wire.decode(message, expect=None, max_bytes=len(message)), message, model.n_blocks)
            walker.advance(block, contribution.weights)


def _first_round(settings: SiteSettings, plan: RunPlan, name: str) -> Preview:
    """The first round of healing; the others have the same shapes, and need the coordinator's parameters."""
    import tempfile

    from fedprllm.federation.protocol import update as wire
    from fedprllm.federation.protocol.parameters import WORDS
    from fedprllm.healing.in_process import Learner
    from fedprllm.healing.participant import HealingText
    from fedprllm.models.blockwise import BlockwiseModel
    from fedprllm.models.source import resolve_model
    from fedprllm.pruning.inputs import make_participants, say_notes

    config = plan.healing
    assert config is not None, "the plan heals"
    config = config.model_copy(update={"device": settings.device or "cpu"})
    source = plan.model
    if plan.of:
        source = str(Path(settings.out or "runs") / plan.of / "model")
    model = BlockwiseModel(
        resolve_model(source if plan.of else settings.model or source),
        config.dtype,
        config.device,
        config.exclude,
    )
    (participant,), reading = make_participants(model, {name: list(settings.data)}, config.reading)
    say_notes([participant])
    config = config.model_copy(update={"window_length": reading.window_length})
    with tempfile.TemporaryDirectory() as folder, Learner(model, config, Path(folder) / "states") as learner:
        text = HealingText(participant)
        (sums,) = learner.contribute([text], learner.tunable.initial(), 0).values()
    update = wire.Update(
        run_id=bytes(16),
        participant=name,
        block=0,
        kind=wire.GRADIENTS,
        model_fingerprint=bytes(32),
        tensors={WORDS: sums.words},
        n_tokens=sums.n_tokens,
    )
    message = wire.encode(update)
    decoded = wire.decode(message, expect=None, max_bytes=len(message))
    return replace(_preview(decoded, message, config.rounds + 1), step="round")


def _preview(update: Any, message: bytes, n_blocks: int) -> Preview:
    tensors = [
        TensorPreview(
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            payload_bytes=(tensor.numel() + 7) // 8 if tensor.dtype.itemsize == 1 else tensor.nbytes,
            rows=_rows(tensor),
        )
        for name, tensor in update.tensors.items()
    ]
    return Preview(update.block, n_blocks, update.kind, update.n_tokens, len(message), tensors)


def _rows(tensor: Any) -> list[str]:
    table = tensor.reshape(-1, tensor.shape[-1])[:_ROWS, :_COLUMNS]
    if tensor.dtype.itemsize == 1:
        return ["".join("#" if pruned else "." for pruned in row) for row in table.tolist()]
    return [" ".join(f"{value:.3g}" for value in row[:8]) for row in table.tolist()]
