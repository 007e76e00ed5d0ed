"""How much the participants agree, from a sample of each mask that costs next to no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedprllm.core.ties import generator
from fedprllm.models.blocks import Block

__all__ = ["Agreement"]

# At half sparsity the standard error of an agreement from this many weights is 0.4 % for one Linear.
_SAMPLE = 16_384
# A matrix over more participants is neither readable nor cheap.
MAX_PARTICIPANTS = 64


class Agreement:
    """Pairwise agreement of the masks of one block: the share of weights two participants treat alike."""

    def __init__(self, block: Block, seed: int) -> None:
        self._block = block
        self._positions = {
            name: torch.randint(
                linear.shape[0] * linear.shape[1],
                (min(_SAMPLE, linear.shape[0] * linear.shape[1]),),
                generator=generator(seed, "agreement", name),
            ).to(block.tensors[name].device)
            for name, linear in block.linears.items()
        }
        self._samples: dict[str, list[Tensor]] = {name: [] for name in block.linears}

    def add(self, masks: Mapping[str, Tensor]) -> None:
        """Keep a sample of one participant's masks; anything else in an update is passed over."""
        for name, samples in self._samples.items():
            is_mask = name in masks and masks[name].dtype == torch.bool
            if is_mask and len(samples) < MAX_PARTICIPANTS:
                samples.append(masks[name].reshape(-1)[self._positions[name]])

    def summary(self) -> dict[str, list[list[float]]]:
        """A matrix [participant, participant] of shares of equal mask entries, by kind of Linear."""
        matrices: dict[str, Any] = {}
        for name, samples in self._samples.items():
            if not samples:
                continue
            signs = torch.stack(samples).to(torch.float32) * 2 - 1
            matrix = (signs @ signs.T / signs.shape[1] + 1) / 2
            matrices[self._block.linears[name].kind] = [[round(x, 5) for x in row] for row in matrix.tolist()]
        return matrices
