"""Vote counts stored as bit planes: the votes of m participants take ceil(log2(m + 1)) bits per weight.

Plane p holds bit p of every weight's count, packed 64 weights to a word. Full adders add a packed mask to
all 64 weights of a word at once: three words of one place value become one word of that value and one of
the next. A mask therefore costs a few word operations per 64 weights, however many participants there are.
The most-voted weights are read off the planes from the highest bit down, without computing the counts.
A mask that counts w times (by its participant's tokens) is added at the place values of w's binary digits.

The bit order is that of a message payload: weight i, in row-major order, is bit ``i % 8`` of byte ``i // 8``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer, Num
from numpy.typing import NDArray
from torch import Tensor

from fedprllm.core.groups import Grouping
from fedprllm.core.masks import PruneMask, exact_float, vote_dtype
from fedprllm.core.selection import select_lowest
from fedprllm.core.threads import in_threads
from fedprllm.core.ties import TIES
from fedprllm.errors import UpdateError

__all__ = ["PackedVotes", "pack"]

Words = NDArray[np.uint64]
Bytes = NDArray[np.uint8]
Bits = NDArray[np.bool_]
Counts = NDArray[np.int64]
Keys = Callable[[], Num[Tensor, "groups n"]]

_ALL = np.uint64(2**64 - 1)
# Words per step: small enough for a full adder's operands to stay in the cache, large enough to hide the
# overhead of a call.
_CHUNK = 2**15
# Minimum words per thread; adding fewer takes less time than waking a second thread.
_WORDS_PER_THREAD = 2**18
# At place values below 2^4 a word may wait for its partner. A carry then reaches the higher planes only once
# in 16 masks, and a mask costs about 6 operations instead of 2 per plane.
_N_WAITING = 4
_N_DIRECT = 2  # with up to this many planes, waiting saves nothing and takes memory
_PLANES_SPLIT = 5  # up to this many planes, splitting 2^planes ways makes a histogram faster than counting
_COUNTED_AT_ONCE = 2**18  # weights; their counts stay in the cache
_SCORED_AT_ONCE = 2**24  # weights; bounds the memory for scores and keys
_ROWS_SUMMED_AT_ONCE = 255  # bits of one column; their sum fits in a byte


class PackedVotes:
    """The number of votes to prune each of ``n_weights`` weights.

    Takes ``ceil(log2(total + 1)) + 4`` bits per weight; for up to 3 votes without the 4.

    Attributes:
        n_weights: Number of weights voted on.
        total: Votes cast so far, and the most that one weight can have: the number of participants, or the
            sum of their voting weights.
    """

    def __init__(self, n_weights: int) -> None:
        self.n_weights = n_weights
        self.total = 0
        self._n_words = -(-n_weights // 64)
        self._planes: list[Words] = []
        self._waiting: list[Words] = []
        # Masks added since the last settling: bit i is set if waiting[i] holds words of place value 2^i.
        self._n_since = 0

    def add(self, *packed: Bytes | Words, weight: int = 1) -> None:
        """Add the masks of one or more participants.

        Adding several at once is faster than one by one: the planes pass through the cache only once.

        Args:
            packed: Masks over all weights, True = pruned, in the format of `pack` and of messages:
                ceil(n / 8) bytes, or the same bytes as 64-bit words. Unused bits are 0. The arrays are read,
                not kept.
            weight: Number of votes that each of these masks counts for, at least 1.

        Raises:
            UpdateError: A mask has the wrong type or length, or an unused bit is set; no mask was added.
        """
        masks = [_as_bytes(mask, self.n_weights) for mask in packed]
        assert weight >= 1, weight
        self.total += weight * len(masks)
        while len(self._planes) < self.total.bit_length():
            self._planes.append(np.zeros(self._n_words, np.uint64))
        places = [place for place in range(weight.bit_length()) if weight >> place & 1]
        waits = weight == 1 and len(self._planes) > _N_DIRECT
        n_waiting = min((self._n_since + len(masks)).bit_length(), _N_WAITING) if waits else 0
        while len(self._waiting) < n_waiting:
            self._waiting.append(np.empty(self._n_words, np.uint64))
        add = self._add_range if waits else partial(self._add_range_at, places)
        _in_threads(partial(add, masks), self._n_words, len(masks) * len(places))
        self._n_since += len(masks) if waits else 0

    def planes(self) -> Integer[Tensor, "planes bytes"]:
        """The bit planes, lowest first, as uint8: ceil(n / 8) bytes each, packed like masks."""
        planes = self.each_plane()
        return torch.stack(planes) if planes else torch.empty(0, -(-self.n_weights // 8), dtype=torch.uint8)

    def each_plane(self) -> list[Integer[Tensor, " bytes"]]:
        """The rows of `planes`, which share memory with the votes."""
        self._settle()
        n_bytes = -(-self.n_weights // 8)
        return [torch.from_numpy(plane.view(np.uint8)[:n_bytes]) for plane in self._planes]

    @classmethod
    def of_planes(cls, planes: Integer[Tensor, "planes bytes"], n_weights: int) -> PackedVotes:
        """Rebuild votes from their `planes`; ``total`` becomes the highest count those planes can hold."""
        votes = cls(n_weights)
        votes.total = 2 ** len(planes) - 1
        for plane in planes.numpy():
            words = np.zeros(votes._n_words, np.uint64)
            words.view(np.uint8)[: len(plane)] = plane
            votes._planes.append(words)
        return votes

    @classmethod
    def of_counts(cls, counts: NDArray[np.unsignedinteger[Any]], total: int) -> PackedVotes:
        """Pack votes that were counted elsewhere.

        Args:
            counts: Votes for each weight, unsigned [n], none above ``total``.
            total: Votes cast.
        """
        votes = cls(len(counts))
        votes.total = total
        for place in range(total.bit_length()):
            words = np.zeros(votes._n_words, np.uint64)
            bit = (counts >> counts.dtype.type(place)).astype(np.uint8, copy=False) & 1
            bits = np.packbits(bit, bitorder="little")
            words.view(np.uint8)[: len(bits)] = bits
            votes._planes.append(words)
        return votes

    def counts(self, start: int = 0, stop: int | None = None) -> Integer[Tensor, " n"]:
        """Votes for the weights in ``[start, stop)``, in the smallest integer type that holds them."""
        self._settle()
        stop = self.n_weights if stop is None else stop
        counts = np.empty(stop - start, _numpy_dtype(self.total))

        def count(first: int) -> None:
            last = min(first + _COUNTED_AT_ONCE, stop)
            counts[first - start : last - start] = self._count(first, last)

        in_threads(count, range(start, stop, _COUNTED_AT_ONCE))
        return torch.from_numpy(counts)

    def histogram(self) -> Int[Tensor, " votes"]:
        """Number of weights that have 0, 1, ..., ``total`` votes."""
        self._settle()
        histogram = np.zeros(self.total + 1, np.int64)
        if 0 < len(self._planes) <= _PLANES_SPLIT:
            for first in range(0, self._n_words, _CHUNK):
                planes = [plane[first : first + _CHUNK] for plane in self._planes]
                self._split(planes, np.full(len(planes[0]), _ALL), 0, histogram)
            # The unused bits after the last weight were counted as weights without votes.
            histogram[0] = self.n_weights - histogram[1:].sum()
            return torch.from_numpy(histogram)
        for first in range(0, self.n_weights, _COUNTED_AT_ONCE):
            counts = self._count(first, min(first + _COUNTED_AT_ONCE, self.n_weights))
            histogram += np.bincount(counts, minlength=len(histogram))
        return torch.from_numpy(histogram)

    def _split(self, planes: list[Words], candidates: Words, votes: int, histogram: Counts) -> None:
        """Add the candidates to the histogram, splitting them plane by plane from the highest down.

        Args:
            planes: Planes not yet examined, lowest first.
            candidates: Bits of the weights whose higher planes hold the value ``votes``.
            votes: Value of the planes already examined.
            histogram: Number of weights by votes; updated in place.
        """
        if votes > self.total:
            return
        if not planes:
            histogram[votes] += int(np.bitwise_count(candidates).sum(dtype=np.int64))
            return
        *lower, plane = planes
        self._split(lower, candidates & plane, votes + 2 ** len(lower), histogram)
        self._split(lower, candidates & ~plane, votes, histogram)

    def most_voted(
        self,
        weight: Float[Tensor, "out in"],
        grouping: Grouping,
        ties: str,
        seed_parts: tuple[object, ...] = (),
    ) -> PruneMask:
        """Prune the ``k = floor(n * sparsity)`` most-voted weights of every comparison group.

        Bit for bit the result of `masks.most_voted` on the counts (FedPrLLM, section 3).

        Args:
            weight: The weights that were voted on.
            grouping: The comparison groups and their sparsity.
            ties: A key of `TIES`.
            seed_parts: Seed of the tie rule ``random``.
        """
        assert weight.numel() == self.n_weights
        shape = (weight.shape[0], weight.shape[1])
        rule, k = TIES[ties], grouping.n_pruned(shape)
        keys = None if rule is None else lambda: grouping.split(_comparable(rule(weight, seed_parts)))
        self._settle()
        if k == 0:
            mask, n_ties = torch.zeros(shape, dtype=torch.bool), 0
        elif grouping.n_m:
            grouped, n_ties = self._most_voted_of_m(k, grouping.n_m[1], keys)
            mask = grouping.join(grouped, shape)
        else:
            mask, n_ties = self._most_voted(shape, grouping, k, keys)
        return PruneMask(mask.to(weight.device), n_ties)

    def _add_range(self, masks: list[Bytes], start: int, stop: int) -> None:
        """Add the words ``[start, stop)`` of all masks."""
        buffers = np.empty((4, min(_CHUNK, stop - start)), np.uint64)
        for first in range(start, stop, _CHUNK):
            size = min(_CHUNK, stop - first)
            for index, mask in enumerate(masks):
                words = _word_chunk(mask, first, buffers[0, :size])
                self._add_chunk(words, first, self._n_since + index, buffers[1:, :size])

    def _add_range_at(self, places: list[int], masks: list[Bytes], start: int, stop: int) -> None:
        """Add the words ``[start, stop)`` of all masks at each place value; waiting words are left alone."""
        buffers = np.empty((3, min(_CHUNK, stop - start)), np.uint64)
        for first in range(start, stop, _CHUNK):
            size = min(_CHUNK, stop - first)
            chunk = slice(first, first + size)
            for mask in masks:
                words = _word_chunk(mask, first, buffers[0, :size])
                for place in places:
                    buffers[1, :size] = words
                    self._ripple(buffers[1, :size], place, chunk, buffers[2, :size])

    def _add_chunk(self, carry: Words, first: int, n_since: int, buffers: Words) -> None:
        """Add words of place value 1: full adders where a partner is waiting, half adders above."""
        chunk = slice(first, first + len(carry))
        scratch, *outputs = buffers
        n_partners = min((~n_since & (n_since + 1)).bit_length() - 1, _N_WAITING)  # trailing ones
        for level in range(n_partners):
            output = outputs[level % 2]
            _full_adder(self._planes[level][chunk], self._waiting[level][chunk], carry, output, scratch)
            carry = output
        if n_partners < _N_WAITING:
            self._waiting[n_partners][chunk] = carry
        else:
            self._ripple(carry, n_partners, chunk, scratch)

    def _ripple(self, carry: Words, level: int, chunk: slice, scratch: Words) -> None:
        """Apply half adders from ``level`` to the top, where no carry remains; overwrites both buffers."""
        for plane in self._planes[level:]:
            np.bitwise_and(plane[chunk], carry, out=scratch)
            np.bitwise_xor(plane[chunk], carry, out=plane[chunk])
            carry, scratch = scratch, carry

    def _settle(self) -> None:
        """Add the waiting words to the planes, so that the planes alone hold the counts."""
        if self._n_since == 0:
            return

        def settle(start: int, stop: int) -> None:
            scratch = np.empty(_CHUNK, np.uint64)
            for first in range(start, stop, _CHUNK):
                size = min(_CHUNK, stop - first)
                chunk = slice(first, first + size)
                for level in range(_N_WAITING):
                    if self._n_since >> level & 1:
                        self._ripple(self._waiting[level][chunk], level, chunk, scratch[:size])

        _in_threads(settle, self._n_words, _N_WAITING)
        self._n_since = 0
        self._waiting.clear()

    def _count(self, start: int, stop: int) -> NDArray[np.integer]:
        """Counts of the weights in ``[start, stop)``, from settled planes."""
        words = slice(start // 64, -(-stop // 64))
        counts = np.zeros((words.stop - words.start) * 64, _numpy_dtype(self.total))
        for plane in reversed(self._planes):
            counts <<= 1
            counts |= np.unpackbits(plane[words].view(np.uint8), bitorder="little")
        return counts[start % 64 :][: stop - start]

    def _most_voted_of_m(self, k: int, m: int, keys: Keys | None) -> tuple[Bool[Tensor, "groups m"], int]:
        """Mark the ``k`` most-voted of every ``m`` consecutive weights."""
        mask, n_ties = torch.empty((self.n_weights // m, m), dtype=torch.bool), 0
        all_keys = None if keys is None else keys()
        step = _SCORED_AT_ONCE // m
        for start in range(0, len(mask), step):
            stop = min(start + step, len(mask))
            # Floats as in `masks.most_voted`: only their partition is vectorized.
            scores = -self.counts(start * m, stop * m).to(exact_float(self.total)).reshape(-1, m)
            tie_key = None if all_keys is None else partial(all_keys.__getitem__, slice(start, stop))
            mask[start:stop], n = select_lowest(scores, k, tie_key)
            n_ties += n
        return mask, n_ties

    def _most_voted(
        self, shape: tuple[int, int], grouping: Grouping, k: int, keys: Keys | None
    ) -> tuple[Bool[Tensor, "out in"], int]:
        """Find each group's vote threshold bit by bit, from the highest plane down.

        Candidates agree with the threshold in all planes seen so far. The next bit of the threshold is 1 if
        at least as many candidates have a 1 there as places are left; if it is 0, candidates with a 1 have
        more votes than the threshold and are pruned. Candidates left at the end are tied at the threshold.
        """
        by_column = grouping.group == "column"
        count = _count_columns if by_column else _count_rows
        rows = (1, self.n_weights) if grouping.group == "layer" else shape
        candidates = np.repeat(_packed_rows(np.ones((1, rows[1]), np.bool_)), rows[0], axis=0)
        above = np.zeros_like(candidates)
        places = np.full(len(count(candidates)), k)
        for plane in reversed(self._planes):
            words = _in_rows(plane, rows)
            hits = candidates & words
            n_hits = count(hits)
            zero = n_hits < places
            flip = _spread(zero, by_column)
            candidates &= words ^ flip
            above |= hits & flip
            places -= np.where(zero, n_hits, 0)
        if by_column:
            above, candidates = _transposed(above, rows), _transposed(candidates, rows)
            places = places[: rows[1]]
        n_ties = _fill_places(above, candidates, places, keys)
        mask = torch.from_numpy(_unpacked(above, grouping.group_size(shape)))
        return grouping.join(mask, shape), n_ties


def pack(mask: Bool[Tensor, "*shape"]) -> Bytes:
    """Pack a mask in row-major order, 8 weights to a byte, the first in the lowest bit."""
    return np.packbits(mask.detach().cpu().contiguous().numpy(), bitorder="little")


# --- Adding ---


def _as_bytes(packed: Bytes | Words, n_weights: int) -> Bytes:
    """Check a packed mask and view it as its ceil(n / 8) bytes."""
    n_bytes = -(-n_weights // 8)
    expected = {np.dtype(np.uint8): n_bytes, np.dtype(np.uint64): -(-n_weights // 64)}.get(packed.dtype)
    if packed.shape != (expected,):
        raise UpdateError(
            f"packed mask of {n_weights} weights: expected {n_bytes} bytes (uint8) or {-(-n_bytes // 8)} "
            f"words (uint64), found shape {packed.shape} of {packed.dtype}; "
            "pack the complete mask of this matrix"
        )
    stored = np.ascontiguousarray(packed).view(np.uint8)
    last_byte = int(stored[n_bytes - 1]) if n_bytes else 0
    unused = last_byte >> (n_weights % 8 or 8)
    if unused or stored[n_bytes:].any():
        raise UpdateError(
            f"packed mask of {n_weights} weights: expected the unused bits of the last byte or word to be 0, "
            "found some set; pad the packed mask of this matrix with zeros"
        )
    return stored[:n_bytes]


def _word_chunk(mask: Bytes, first: int, buffer: Words) -> Words:
    """The words from ``first`` on: a view, or a copy in the buffer if unaligned or incomplete."""
    part = mask[first * 8 : (first + len(buffer)) * 8]
    if part.nbytes == buffer.nbytes:
        words = part.view(np.uint64)
        if words.flags.aligned:
            return words
    buffer[-1] = 0
    buffer.view(np.uint8)[: len(part)] = part
    return buffer


def _full_adder(total: Words, waiting: Words, carry: Words, output: Words, scratch: Words) -> None:
    """Compute ``total + waiting + carry = total' + 2 * output`` bit by bit.

    ``total`` is updated in place; ``output`` and ``scratch`` are overwritten.
    """
    np.bitwise_xor(waiting, carry, out=scratch)
    np.bitwise_xor(total, waiting, out=output)
    # The majority of the three bits is `waiting` where it equals `carry`, and `total` elsewhere.
    np.bitwise_and(output, scratch, out=output)
    np.bitwise_xor(output, waiting, out=output)
    np.bitwise_xor(total, scratch, out=total)


def _in_threads(task: Callable[[int, int], None], n_words: int, n_masks: int) -> None:
    """Run ``task(start, stop)`` over all words in as many threads as torch uses; NumPy releases the GIL."""
    n_threads = min(torch.get_num_threads(), n_words * n_masks // _WORDS_PER_THREAD)
    if n_threads < 2:
        task(0, n_words)
        return
    bounds = [n_words * index // n_threads for index in range(n_threads + 1)]
    in_threads(lambda part: task(*part), list(pairwise(bounds)))


def _numpy_dtype(total: int) -> np.dtype[np.integer]:
    return torch.empty(0, dtype=vote_dtype(total)).numpy().dtype


# --- Selecting: a group is a row of words, or a column of bits ---


def _in_rows(plane: Words, rows: tuple[int, int]) -> Words:
    """A plane in which every row starts at a new word."""
    n_rows, n = rows
    if n_rows == 1 or n % 64 == 0:
        return plane.reshape(n_rows, -1)
    return _packed_rows(_unpacked(plane[None], n_rows * n).reshape(rows))


def _unpacked(words: Words, n: int) -> Bits:
    """The first ``n`` bits of each row of words."""
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=n, bitorder="little")
    return bits.view(np.bool_)


def _packed_rows(bits: Bits) -> Words:
    words = np.zeros((len(bits), -(-bits.shape[1] // 64)), np.uint64)
    stored = np.packbits(bits, axis=1, bitorder="little")
    words.view(np.uint8)[:, : stored.shape[1]] = stored
    return words


def _transposed(words: Words, rows: tuple[int, int]) -> Words:
    return _packed_rows(torch.from_numpy(_unpacked(words, rows[1])).T.contiguous().numpy())


def _count_rows(words: Words) -> Counts:
    counts: Counts = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    return counts


def _count_columns(words: Words) -> Counts:
    counts = np.zeros(words.shape[1] * 64, np.int64)
    for start in range(0, len(words), _ROWS_SUMMED_AT_ONCE):
        stored = words[start : start + _ROWS_SUMMED_AT_ONCE].view(np.uint8)
        counts += np.unpackbits(stored, axis=1, bitorder="little").sum(axis=0, dtype=np.uint8)
    return counts


def _spread(flags: NDArray[np.bool_], by_column: bool) -> Words:
    """Words of ones for the groups whose flag is set, in a shape that broadcasts over all rows."""
    if by_column:
        return np.packbits(flags, bitorder="little").view(np.uint64)
    return np.where(flags, _ALL, np.uint64(0))[:, None]


def _fill_places(above: Words, candidates: Words, places: Counts, keys: Keys | None) -> int:
    """Add candidates to ``above`` until each row's places are filled; return how many a tie rule chose."""
    contested = (_count_rows(candidates) > places).nonzero()[0]
    chosen = candidates.copy()
    if len(contested) and keys is None:
        chosen[contested] = _first_by_index(candidates[contested], places[contested])
    elif len(contested) and keys is not None:
        all_keys = keys().numpy()
        step = max(1, _SCORED_AT_ONCE // all_keys.shape[1])
        for start in range(0, len(contested), step):
            rows = contested[start : start + step]
            chosen[rows] = _first_by_key(candidates[rows], places[rows], all_keys[rows])
    above |= chosen
    return int(places[contested].sum())


def _first_by_index(candidates: Words, places: Counts) -> Words:
    """The first ``places`` candidates of each row; every row has more candidates than places."""
    per_word = np.bitwise_count(candidates)
    up_to = per_word.cumsum(axis=1, dtype=np.int64)
    taken = up_to <= places[:, None]
    chosen = np.where(taken, candidates, np.uint64(0))
    rows, split = np.arange(len(candidates)), taken.sum(axis=1)
    left = places - (up_to[rows, split] - per_word[rows, split])
    bits = _unpacked(candidates[rows, split, None], 64)
    chosen[rows, split] = _packed_rows(bits & (bits.cumsum(axis=1) <= left[:, None]))[:, 0]
    return chosen


def _first_by_key(candidates: Words, places: Counts, keys: NDArray[np.floating]) -> Words:
    """The ``places`` candidates of each row with the lowest keys; ties in the key go to the lowest index."""
    bits = _unpacked(candidates, keys.shape[1])
    # NumPy's vectorized sort of whole rows is faster than partitioning each row at its own place.
    ranked = np.sort(np.where(bits, keys, np.inf), axis=1)
    threshold = ranked[np.arange(len(places)), places - 1][:, None]
    lower = bits & (keys < threshold)
    chosen = _packed_rows(lower)
    _fill_places(chosen, _packed_rows(bits & (keys == threshold)), places - lower.sum(axis=1), None)
    return chosen


def _comparable(keys: Num[Tensor, "out in"]) -> Num[Tensor, "out in"]:
    """Keys on the CPU, in a type that NumPy can sort; their order is unchanged."""
    return keys.cpu() if keys.element_size() > 2 else keys.cpu().to(torch.float32)
