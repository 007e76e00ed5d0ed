"""Dry run: compute and show the updates a participant would send, without any connection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
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
            ``.`` one to keep. Words under masks are in hexadecimal. Other kinds show numbers.
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
        hidden: Under masks, what the words are made of; it stays on this machine.
        step: What ``block`` and ``n_blocks`` count: blocks, or rounds of healing.
    """

    block: int
    n_blocks: int
    kind: str
    n_tokens: int
    message_bytes: int
    tensors: list[TensorPreview]
    hidden: list[TensorPreview] = field(default_factory=list)
    step: str = "block"


def dry_run(
    settings: SiteSettings, plan: RunPlan, name: str, n_blocks: int = 1, n_participants: int = 3
) -> Iterator[Preview]:
    """Compute the updates of the first blocks exactly as in a run, and decode them from their messages.

    Blocks after the first are computed from the participant's own decisions, or from the unpruned blocks if
    it makes none. In an iterative run they would follow the coordinator's decisions. Allocation and layer
    sampling depend on all participants, so every block is shown at the sparsity of the model. Under masks
    (secure), the words are those of a run, hidden by a mask drawn for this preview.

    Args:
        settings: The participant's own settings.
        plan: The run.
        name: Name of the participant.
        n_blocks: Number of blocks to compute.
        n_participants: Number of participants for whose votes words under masks have room.

    Yields:
        The update of each block.

    Raises:
        ConfigError: The run asks for a kind of update that may not be sent, or for updates in the clear
            where only those under masks may be.
        DataError: The text cannot be used.
        ModelError: The model cannot be used.
    """
    from fedprllm.federation.protocol import update as wire
    from fedprllm.federation.protocol.names import to_wire
    from fedprllm.models.blockwise import BlockwiseModel
    from fedprllm.models.source import resolve_model
    from fedprllm.pruning.inputs import make_participants, say_notes
    from fedprllm.pruning.masked_totals import layout_of
    from fedprllm.pruning.method import pruning_method
    from fedprllm.pruning.walk import Walker

    _check_allowed(settings, plan)
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
    method = pruning_method(config)
    walker = Walker(participant, method, model.n_blocks)
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
            hidden: list[TensorPreview] = []
            if config.secure:
                layout = layout_of(block, method, n_participants)
                counted = {name: contribution.update[name] for name in layout.names}
                hidden = _previews(to_wire(counted, block.linears))
                words = _under_a_mask(layout.pack(contribution.update, participant.n_tokens))
                update = replace(update, kind=wire.MASKED, n_tokens=0, tensors={"words": words})
            message = wire.encode(update)
            found = wire.decode(message, expect=None, max_bytes=len(message))
            yield Preview(
                index,
                model.n_blocks,
                found.kind,
                found.n_tokens,
                len(message),
                _previews(found.tensors),
                hidden,
            )
            walker.advance(block, contribution.weights)


def _first_round(settings: SiteSettings, plan: RunPlan, name: str) -> Preview:
    """The first round of healing; the others have the same shapes, and need the coordinator's parameters."""
    import tempfile

    from fedprllm.federation.protocol import update as wire
    from fedprllm.federation.protocol.parameters import WORDS
    from fedprllm.healing.in_process import Learner, open_dense
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
    dense = None
    if config.loss == "dense":
        if settings.model is None:
            raise ConfigError(
                "loss dense compares with the model before pruning: name your copy with --model"
            )
        dense = open_dense(settings.model, model, config)
    with (
        tempfile.TemporaryDirectory() as folder,
        Learner(model, config, Path(folder) / "states", dense) as learner,
    ):
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
    hidden: list[TensorPreview] = []
    if config.secure:
        hidden = _previews(update.tensors)
        words = _under_a_mask(sums.words.numpy().view("<u8").copy())
        update = replace(update, kind=wire.MASKED, n_tokens=0, tensors={WORDS: words})
    message = wire.encode(update)
    found = wire.decode(message, expect=None, max_bytes=len(message))
    return Preview(
        0,
        config.rounds + 1,
        found.kind,
        found.n_tokens,
        len(message),
        _previews(found.tensors),
        hidden,
        step="round",
    )


def _check_allowed(settings: SiteSettings, plan: RunPlan) -> None:
    """Refuse what a real run would be refused for, before computing."""
    refused = [kind for kind in plan.kinds if kind not in settings.allow]
    if refused:
        raise ConfigError(
            f"the run asks for {', '.join(refused)}, and {', '.join(settings.allow)} may be sent (--allow): "
            "it would be refused; repeat --allow for every kind that you allow"
        )
    if settings.require_secure and not plan.config.secure:
        raise ConfigError(
            "the run asks for updates in the clear, and only sums are shared (--require-secure): it would be "
            "refused; the plan needs secure = true under [prune]"
        )


def _under_a_mask(words: Any) -> Any:
    """Words hidden like those of a run, int64 [n]; nobody can take the mask off."""
    import secrets

    import torch

    from fedprllm.secure.streams import apply_streams

    apply_streams(words, [(secrets.token_bytes(32), True)])
    return torch.from_numpy(words.view("<i8"))


def _previews(tensors: Mapping[str, Any]) -> list[TensorPreview]:
    return [
        TensorPreview(
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            payload_bytes=(tensor.numel() + 7) // 8 if tensor.dtype.itemsize == 1 else tensor.nbytes,
            rows=_rows(tensor),
        )
        for name, tensor in tensors.items()
    ]


def _rows(tensor: Any) -> list[str]:
    table = tensor.reshape(-1, tensor.shape[-1])[:_ROWS, :_COLUMNS]
    if tensor.dtype.itemsize == 1:
        return ["".join("#" if pruned else "." for pruned in row) for row in table.tolist()]
    if not tensor.is_floating_point():
        return [" ".join(f"{value % 2**64:x}" for value in row[:4]) for row in table.tolist()]
    return [" ".join(f"{value:.3g}" for value in row[:8]) for row in table.tolist()]
