"""How much the participants' masks agree, estimated from a small sample of each mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedprllm.core.ties import generator
from fedprllm.models.block import Block

__all__ = ["Agreement"]

# At 50 % sparsity, this sample size gives a standard error of 0.4 % for the agreement on one Linear.
_SAMPLE = 16_384
# A larger matrix would be neither readable nor cheap.
MAX_PARTICIPANTS = 64


class Agreement:
    """Pairwise agreement of one block's masks: the share of weights that two participants treat alike.

    Args:
        block: The block.
        seed: Seed of the sampled positions.
    """

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
        """Sample the masks in one participant's update; its other tensors are ignored."""
        for tensor, values in update.items():
            name = tensor.removesuffix(".mask")
            if values.dtype == torch.bool and len(self._samples[name]) < MAX_PARTICIPANTS:
                self._samples[name].append(values.reshape(-1)[self._positions[name]])

    def summary(self) -> dict[str, list[list[float]]]:
        """Share of equal mask entries as a matrix [participant, participant], by path of the Linear."""
        matrices: dict[str, Any] = {}
        for name, samples in self._samples.items():
            if not samples:
                continue
            signs = torch.stack(samples).to(torch.float32) * 2 - 1
            matrix = (signs @ signs.T / signs.shape[1] + 1) / 2
            matrices[self._block.linears[name].path] = [[round(x, 5) for x in row] for row in matrix.tolist()]
        return matrices
