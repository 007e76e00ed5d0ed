"""How much the participants agree, from a sample of each mask that costs next to no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedprllm.core.ties import generator
from fedprllm.models.block import Block

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
                linear.n_weights,
                (min(_SAMPLE, linear.n_weights),),
                generator=generator(seed, "agreement", name),
            ).to(block.tensors[name].device)
            for name, linear in block.linears.items()
        }
        self._samples: dict[str, list[Tensor]] = {name: [] for name in block.linears}

    def add(self, update: Mapping[str, Tensor]) -> None:
        """Keep a sample of the masks in one participant's update; anything else in it is passed over."""
        for tensor, values in update.items():
            name = tensor.removesuffix(".mask")
            if values.dtype == torch.bool and len(self._samples[name]) < MAX_PARTICIPANTS:
                self._samples[name].append(values.reshape(-1)[self._positions[name]])

    def summary(self) -> dict[str, list[list[float]]]:
        """A matrix [participant, participant] of shares of equal mask entries, by path of the Linear."""
        matrices: dict[str, Any] = {}
        for name, samples in self._samples.items():
            if not samples:
                continue
            signs = torch.stack(samples).to(torch.float32) * 2 - 1
            matrix = (signs @ signs.T / signs.shape[1] + 1) / 2
            matrices[self._block.linears[name].path] = [[round(x, 5) for x in row] for row in matrix.tolist()]
        return matrices
