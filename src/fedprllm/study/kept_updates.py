"""Stored updates of participants: each walk is computed once and serves every cell that can use it.

A one-shot participant's updates depend on its text and on its own options, never on the server's. Varying the
server group, the scaling, the server's tie rule or the number of participants therefore needs no further
forward passes, and neither do the models pruned alone or with pooled text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.bitplanes import pack
from fedprllm.errors import RunError
from fedprllm.files import file_digest, read_sealed, save_tensors, write_sealed
from fedprllm.models.block import Block
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.method import pruning_method
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.walk import Walker
from fedprllm.sharing import SHARING, update_bytes
from fedprllm.sharing.interface import Shapes
from fedprllm.study.records import WalkRecord

__all__ = ["KeptWalk", "KeptWalks", "is_served"]

# Ways of sharing whose one-shot updates are stored; the updates of the others are too large.
_SHARES = ("mask", "statistics")
_STRATEGIES = ("one-shot", "local-only", "centralized")
# Options that only the server uses, and options that the fingerprint of the windows covers.
_SERVER = (
    "server_group",
    "strategy",
    "scale_weights",
    "server_ties",
    "weighting",
    "aggregation",
    "max_update_mb",
)
_TEXT = ("windows", "window_length", "bos", "seed")
# Options of a participant's own decision, which do not affect shared sums.
_DECIDING = ("sparsity", "pattern", "criterion", "local_group", "ties")
_COMPUTING = ("share", "dtype", "device")


def is_served(config: PruneConfig) -> bool:
    """Whether a run's decisions follow from stored walks; otherwise it must be computed as an ordinary run.

    An option unknown here is assumed to change the walk, unless it has its default value.
    """
    known = {*_SERVER, *_TEXT, *_DECIDING, *_COMPUTING}
    fields = type(config).model_fields
    others_default = all(
        getattr(config, name) == field.default for name, field in fields.items() if name not in known
    )
    # Without a vote, the model is made of a participant's own masks; walks that share sums store none.
    alone = config.strategy != "one-shot" and config.share != "mask"
    return config.share in _SHARES and config.strategy in _STRATEGIES and others_default and not alone


@dataclass(frozen=True)
class KeptWalk:
    """The stored updates of one participant.

    Attributes:
        folder: Folder with one safetensors file per block; masks are stored as packed bits.
        record: The record of the walk.
    """

    folder: Path
    record: WalkRecord

    def update(self, block: Block, shapes: Shapes) -> dict[str, Tensor]:
        """Load the update of a block as `Sharing.contribute` made it."""
        stored = load_file(self.folder / f"block-{block.index:04d}.safetensors")
        return {name: _unpacked(stored[name], *shape) for name, shape in shapes.items()}


class KeptWalks:
    """Stored walks by everything they depend on, each computed on first use.

    Args:
        model: The model.
        digest: The model's fingerprint.
        folder: Folder of the stored walks.
    """

    def __init__(self, model: BlockwiseModel, digest: str, folder: Path) -> None:
        self._model, self._digest, self._folder = model, digest, folder
        self._checked: dict[Path, KeptWalk] = {}

    def key(self, participant: Participant, config: PruneConfig) -> str:
        """Folder name of a walk: a hash of everything that the walk depends on."""
        values = config.model_dump(mode="json", include={*_DECIDING, *_COMPUTING})
        if not SHARING[config.share].shares_decision:
            values = {name: value for name, value in values.items() if name not in _DECIDING}
        elif config.ties == "random":
            values["seed"] = config.seed
        text = json.dumps([self._digest, participant.fingerprint, values], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def has(self, participant: Participant, config: PruneConfig) -> bool:
        """Whether the walk is stored."""
        return self._stored(self._folder / self.key(participant, config)) is not None

    def _stored(self, folder: Path) -> KeptWalk | None:
        """A stored walk, with its files checked once; None if it is missing, incomplete or damaged."""
        if folder not in self._checked:
            try:
                record = WalkRecord.model_validate(read_sealed(folder / "walk.json"))
                whole = all(file_digest(folder / name) == digest for name, digest in record.files.items())
            except (FileNotFoundError, RunError, ValueError):
                return None
            if not whole:
                return None
            self._checked[folder] = KeptWalk(folder, record)
        return self._checked[folder]

    def bytes_of(self, config: PruneConfig) -> int:
        """Disk space of one walk in bytes."""
        return sum(update_bytes(SHARING[config.share].shapes(linears)) for linears in self._model.linears)

    def of(self, participant: Participant, config: PruneConfig, advance: Callable[[int], None]) -> KeptWalk:
        """A participant's one-shot walk through all blocks, computed only if it is not stored yet.

        Args:
            participant: The participant that walks.
            config: A configuration for which `is_served` is true.
            advance: Called with the number of windows that went through a block.
        """
        folder = self._folder / self.key(participant, config)
        kept = self._stored(folder)
        if kept is None:
            folder.mkdir(parents=True, exist_ok=True)
            n_ties = self._take(participant, config, folder, advance)
            files = {path.name: file_digest(path) for path in sorted(folder.glob("block-*.safetensors"))}
            record = WalkRecord(participant=participant.describe(), n_ties=n_ties, files=files)
            write_sealed(folder / "walk.json", record.as_json())
            kept = self._checked[folder] = KeptWalk(folder, record)
        return kept

    def _take(
        self, participant: Participant, config: PruneConfig, folder: Path, advance: Callable[[int], None]
    ) -> int:
        """Walk once and store every update; returns the number of prunes decided by the tie rule."""
        n_ties = 0
        # A participant shares the same under every strategy whose updates are stored.
        method = pruning_method(config.model_copy(update={"strategy": "one-shot"}))
        walker = Walker(participant, method, self._model.n_blocks)
        walker.enter(self._model)
        n_windows = len(participant.windows) if method.uses_inputs else 0
        for index in range(self._model.n_blocks):
            with self._model.block(index) as block:
                contribution = walker.contribute(block)
                assert contribution.update is not None, "a stored walk prunes every block"
                advance(n_windows)
                path = folder / f"block-{index:04d}.safetensors"
                save_tensors(path, {name: _packed(tensor) for name, tensor in contribution.update.items()})
                walker.advance(block, contribution.weights)
                if contribution.decision is not None:
                    n_ties += contribution.decision.n_ties
                    advance(n_windows)
        participant.hidden.clear()
        return n_ties


def _packed(tensor: Tensor) -> Tensor:
    return torch.from_numpy(pack(tensor)) if tensor.dtype == torch.bool else tensor.cpu()


def _unpacked(stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype != torch.bool:
        return stored
    bits = np.unpackbits(stored.numpy(), count=prod(shape), bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(shape)
