"""Updates as 64-bit words, so that masks can be added to them, and sums of words as sums of updates.

| part | words |
|---|---|
| windows | one: the participant's number of windows |
| votes, for each tensor in the order of names | counts of 0 or 1 (or of windows, where votes weigh tokens) |
| sums, for each tensor in the order of names | integers of the grid, lower words first |

Added up modulo 2^64, word by word, they are the words of the sum. What follows from the votes, such as the
sum of retained weights, is not sent at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from fedprllm.core.bitplanes import PackedVotes
from fedprllm.core.fixed_point import FixedPointSum, Grid
from fedprllm.errors import UpdateError
from fedprllm.secure.words import Words, n_words, pack_counts, unpack_counts
from fedprllm.sharing.interface import ExactSums, Linears, Sharing, Totals

__all__ = ["Layout", "masked_bytes"]


def masked_bytes(sharing: Sharing, linears: Linears, n_participants: int, max_windows: int = 0) -> int:
    """Payload of an update under masks in bytes; the arguments are those of `Layout`."""
    bits = _bits(n_participants, max_windows)
    words = 1
    for shape, dtype in sharing.shapes(linears).values():
        if dtype == torch.bool:
            words += n_words(prod(shape), bits)
        elif sharing.wire.grid is not None:
            words += sharing.wire.grid.n_words * prod(shape)
    return 8 * words


def _bits(n_participants: int, max_windows: int) -> int:
    """Bits of a count of votes: enough for all votes of all participants."""
    return (n_participants * max(1, max_windows)).bit_length()


@dataclass(frozen=True)
class Layout:
    """Where the parts of an update are in its words.

    Attributes:
        empty: Empty sums of the kind of update.
        n_participants: Number of participants that may contribute.
        window_length: Tokens in a window.
        max_windows: Most windows of a participant, if its votes weigh tokens; otherwise 0.
    """

    empty: Totals
    n_participants: int
    window_length: int
    max_windows: int = 0

    @property
    def _bits(self) -> int:
        return _bits(self.n_participants, self.max_windows)

    @property
    def _exact(self) -> dict[str, FixedPointSum]:
        sums = self.empty.sums
        return dict(sorted(sums.parts.items())) if isinstance(sums, ExactSums) else {}

    @property
    def _votes(self) -> dict[str, int]:
        return {name: votes.n_weights for name, votes in sorted(self.empty.votes.items())}

    @property
    def names(self) -> list[str]:
        """Names of the tensors of an update that become words."""
        return [*self._votes, *self._exact]

    @property
    def n_words(self) -> int:
        """Length of an update in words."""
        votes = sum(n_words(n, self._bits) for n in self._votes.values())
        return 1 + votes + sum(total.words.numel() for total in self._exact.values())

    def pack(self, update: Mapping[str, Tensor], n_tokens: int) -> Words:
        """One participant's update as words, uint64 [n_words].

        Raises:
            UpdateError: A number is so large that a sum of such numbers may not fit.
        """
        windows = n_tokens // self.window_length
        vote = np.uint64(windows if self.max_windows else 1)
        parts = [np.array([windows], np.uint64)]
        for name in self._votes:
            mask = update[name].reshape(-1).cpu().numpy()
            parts.append(pack_counts(mask.astype(np.uint64) * vote if self.max_windows else mask, self._bits))
        for name, total in self._exact.items():
            self._check_size(name, total.grid, update[name])
            words = total.grid.words(update[name].reshape(-1)).cpu().reshape(-1)
            parts.append(words.numpy().view(np.uint64))
        return np.concatenate(parts)

    def _check_size(self, name: str, grid: Grid, values: Tensor) -> None:
        most = 2.0 ** (62 - grid.fraction_bits) / self.n_participants
        if grid.n_words == 1 and not bool((values.abs() < most).all()):
            raise UpdateError(
                f"'{name}' has a sum of {float(values.abs().max()):.3g}: expected less than {most:.3g} with "
                f"{self.n_participants} participants under masks: use fewer windows, or share statistics"
            )

    def unpack(self, words: Words, n_added: int) -> Totals:
        """Sums of updates from the sum of their words.

        Args:
            words: Sum of the words of ``n_added`` updates.
            n_added: Number of updates.

        Raises:
            UpdateError: A count exceeds what honest participants can add up to.
        """
        windows = int(words[0])
        votes_cast = windows if self.max_windows else n_added
        unit = self.window_length if self.max_windows else 1
        start, votes = 1, {}
        for name, n in self._votes.items():
            stop = start + n_words(n, self._bits)
            counts = unpack_counts(words[start:stop], self._bits, n)
            if int(counts.max()) > votes_cast:
                raise UpdateError(
                    f"'{name}': a weight has {int(counts.max())} votes of {votes_cast}: a participant has "
                    "cast more than its own"
                )
            scaled = counts if unit == 1 else counts * np.uint64(unit)
            votes[name] = PackedVotes.of_counts(scaled, votes_cast * unit)
            start = stop
        sums = {}
        for name, total in self._exact.items():
            stop = start + total.words.numel()
            part = torch.from_numpy(words[start:stop].view(np.int64).copy()).reshape(total.words.shape)
            sums[name] = FixedPointSum(total.grid, part.to(total.words.device))
            start = stop
        return replace(
            self.empty,
            sums=self.empty.sums.holding(sums) if isinstance(self.empty.sums, ExactSums) else {},
            votes=votes,
            n_participants=n_added,
            n_tokens=windows * self.window_length,
            weight=windows * self.window_length if self.max_windows else n_added,
        )
