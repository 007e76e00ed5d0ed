"""The golden set in few bytes: what the paper's code pruned as bits, its votes and factors as bit planes.

``<kind>/s<sparsity>/<weight name>`` is a uint8 array. For masks (entries that are zero) it holds one bit per
weight; for votes and for the factors of scaled weights, which are whole numbers from 0 to 4 (a factor counts
quarters, as there are four participants), three such arrays, the lowest bit first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

N_PARTICIPANTS = 4
_N_PLANES = 3
DATA = Path(__file__).parent / "data"
MODEL = DATA / "tiny-llama"


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(bits.numpy().reshape(-1)))


def unpack_bits(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=shape.numel())).bool().view(shape)


def pack_counts(counts: torch.Tensor) -> torch.Tensor:
    assert counts.min() >= 0
    assert counts.max() <= N_PARTICIPANTS
    return torch.stack([pack_bits((counts.int() >> plane) & 1 == 1) for plane in range(_N_PLANES)])


def unpack_counts(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    planes = [unpack_bits(plane, shape).to(torch.int8) << number for number, plane in enumerate(packed)]
    return torch.stack(planes).sum(0, dtype=torch.int8)


class Golden:
    """What the paper's code gave, by weight name, and what it was given."""

    def __init__(self) -> None:
        self._packed = load_file(DATA / "reference.safetensors")
        self.dense = load_file(MODEL / "model.safetensors")
        tokens = self._packed.pop("tokens")
        self.windows = [tokens[2 * c : 2 * c + 2] for c in range(N_PARTICIPANTS)]

    def zeros(self, kind: str, sparsity: float) -> dict[str, torch.Tensor]:
        """Which entries were zero at the end."""
        found = self._of(kind, sparsity)
        return {name: unpack_bits(bits, self.dense[name].shape) for name, bits in found.items()}

    def votes(self, sparsity: float) -> dict[str, torch.Tensor]:
        """The summed prune masks of the participants."""
        found = self._of("oneshot_votes", sparsity)
        return {name: unpack_counts(planes, self.dense[name].shape) for name, planes in found.items()}

    def scaled(self, group: str, sparsity: float) -> dict[str, torch.Tensor]:
        """The weights that were kept, scaled by the votes against them; the others are zero."""
        return {
            name: self.dense[name] * unpack_counts(planes, self.dense[name].shape) / N_PARTICIPANTS
            for name, planes in self._of(f"oneshot_{group}_scaled", sparsity).items()
        }

    def _of(self, kind: str, sparsity: float) -> dict[str, torch.Tensor]:
        prefix = f"{kind}/s{sparsity}/"
        found = {n.removeprefix(prefix): t for n, t in self._packed.items() if n.startswith(prefix)}
        assert found, f"no golden outputs under {prefix}"
        return found
