"""Votes in bit planes compared with unpack-and-add; packing; 1,000 participants and 100 million weights.

    python -m benchmarks.votes [--quick]

Masks are random bits at a sparsity of 0.5. A pool of a few dozen distinct masks, larger than any cache, is
reused, because the time depends not on the content of a mask but on where in memory it comes from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, pairwise, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._harness import (
    SEED,
    alternate,
    arguments,
    copier,
    in_fresh_process,
    machine,
    print_json,
    print_table,
    rss_bytes,
)
from fedprllm.core.bitplanes import PackedVotes, pack
from fedprllm.core.groups import Grouping
from fedprllm.core.masks import most_voted

Words = NDArray[np.uint64]

N_DISTINCT = 32
AT_ONCE = 16
UNPACKED_AT_ONCE = 2**13  # bytes of a mask; their counts fit in the cache


def mask_pool(n_weights: int) -> list[Words]:
    generator = np.random.default_rng(SEED)
    n_words = n_weights // 64
    return [generator.integers(0, 2**64, n_words, dtype=np.uint64) for _ in range(N_DISTINCT)]


# ---- adding ------------------------------------------------------------------------------------------


def unpack_and_add(counts: NDArray[Any], masks: list[Words]) -> None:
    for mask in masks:
        counts += np.unpackbits(mask.view(np.uint8), bitorder="little")


def unpack_and_add_in_cache(counts: NDArray[Any], masks: list[Words], threads: int) -> None:
    """Do the same in the best known way: chunk by chunk, in threads."""

    def add(part: tuple[int, int]) -> None:
        for mask in masks:
            stored = mask.view(np.uint8)
            for start in range(*part, UNPACKED_AT_ONCE):
                bits = np.unpackbits(
                    stored[start : min(start + UNPACKED_AT_ONCE, part[1])], bitorder="little"
                )
                counts[start * 8 : start * 8 + len(bits)] += bits

    bounds = [len(counts) // 64 * index // threads * 8 for index in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(add, pairwise(bounds)))


def bench_adding(n_weights: int, repeats: int) -> dict[str, Any]:
    """Measure each contender's seconds per mask, with counts for 1,000 participants (ten planes, int16)."""
    pool, threads = mask_pool(n_weights), torch.get_num_threads()
    single, several = PackedVotes(n_weights), PackedVotes(n_weights)
    for votes in (single, several):
        for _ in range(513 // AT_ONCE + 1):
            votes.add(*pool[:AT_ONCE])
    counts = {dtype: np.zeros(n_weights, dtype) for dtype in (np.uint8, np.int16, np.int32)}
    starts = cycle(range(0, N_DISTINCT, AT_ONCE))

    def some() -> list[Words]:
        start = next(starts)
        return pool[start : start + AT_ONCE]

    copy, copied_bytes = copier(threads)
    at_once = f"planes, {AT_ONCE} at once"
    contenders: dict[str, Callable[[], object]] = {
        "planes": lambda: [single.add(mask) for mask in some()],
        at_once: lambda: several.add(*some()),
        "unpack and add, uint8": lambda: unpack_and_add(counts[np.uint8], some()),
        "unpack and add, int16": lambda: unpack_and_add(counts[np.int16], some()),
        "unpack and add, int32": lambda: unpack_and_add(counts[np.int32], some()),
        "int16 in cache and threads": lambda: unpack_and_add_in_cache(counts[np.int16], some(), threads),
        "copy": copy,
    }
    timings = alternate(contenders, repeats)
    bytes_per_second = copied_bytes / timings.pop("copy").seconds
    rows = {name: timing.per(AT_ONCE).as_json() for name, timing in timings.items()}
    for row in rows.values():
        row["times_planes"] = row["seconds"] / rows["planes"]["seconds"]
        row["times_planes_cpu"] = row["cpu_seconds"] / rows["planes"]["cpu_seconds"]
    for name, n in (("planes", 1), (at_once, AT_ONCE)):
        moved = moved_bytes(n_weights, single.total.bit_length(), n)
        rows[name]["moved_bytes"] = moved
        rows[name]["bandwidth_fraction"] = moved / rows[name]["seconds"] / bytes_per_second
    return {"n_weights": n_weights, "copy_bytes_per_second": bytes_per_second, "contenders": rows}


def moved_bytes(n_weights: int, n_planes: int, at_once: int) -> float:
    """Average number of bytes that adding one mask reads from and writes to memory.

    One by one: the mask is read. At each of the four lowest places, half of the carries wait (one write) and
    half meet a partner (two reads, one write). One carry in 16 passes through each higher plane (one read,
    one write). At once: all planes and all waiting carries are read and written once for all masks.
    """
    if at_once == 1:
        words = 1 + sum(2 / 2**level for level in range(4)) + 2 * (n_planes - 4) / 16
    else:
        words = 1 + 2 * (n_planes + 4) / at_once
    return words * n_weights / 8


# ---- participants ------------------------------------------------------------------------------------


def add_participants(n_participants: int, n_weights: int, threads: int) -> dict[str, Any]:
    """Measure the time and memory of adding the masks of ``n_participants``, one mask at a time."""
    torch.set_num_threads(threads)
    pool = mask_pool(n_weights)
    before = rss_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    votes = PackedVotes(n_weights)
    for index in range(n_participants):
        votes.add(pool[index % N_DISTINCT])
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    added_bytes = rss_bytes() - before
    used = votes.counts(0, 10_000)
    expected = sum(
        np.unpackbits(pool[i % N_DISTINCT].view(np.uint8)[:1250], bitorder="little").astype(np.int32)
        for i in range(n_participants)
    )
    assert np.array_equal(used.numpy(), expected)
    return {
        "n_participants": n_participants,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "ms_per_mask": seconds / n_participants * 1e3,
        "cpu_ms_per_mask": cpu_seconds / n_participants * 1e3,
        "votes_bytes": added_bytes,
        "votes_bits_per_weight": added_bytes * 8 / n_weights,
        "peak_rss_bytes": rss_bytes(peak=True),
        "masks_bytes": N_DISTINCT * n_weights // 8,
    }


# ---- packing and selection -----------------------------------------------------------------------------


def bench_packing(n_weights: int, repeats: int) -> dict[str, Any]:
    """Measure packing and unpacking as in the wire format, in GB/s of unpacked mask (1 byte per weight)."""
    mask = torch.from_numpy(np.random.default_rng(SEED).integers(0, 2, n_weights, dtype=np.uint8)).bool()
    packed = pack(mask)
    timings = alternate(
        {
            "pack": lambda: pack(mask),
            "unpack": lambda: np.unpackbits(packed, count=n_weights, bitorder="little"),
        },
        repeats,
    )
    return {
        name: {**timing.as_json(), "gb_per_second": n_weights / timing.seconds / 1e9}
        for name, timing in timings.items()
    }


def bench_selection(shape: tuple[int, int], n_participants: int, repeats: int) -> list[dict[str, Any]]:
    """Select the half with the most votes, from bit planes and from existing integer counts."""
    pool = mask_pool(shape[0] * shape[1])
    votes = PackedVotes(shape[0] * shape[1])
    generator = np.random.default_rng(SEED)
    for _ in range(n_participants):  # combining masks spreads the votes over many different counts
        a, b, c = (pool[i] for i in generator.integers(0, N_DISTINCT, 3))
        votes.add(a & b | c & pool[0])
    counts = votes.counts().reshape(shape)
    weight = torch.randn(shape)
    results = []
    for group, ties in product(("layer", "row", "column"), ("index", "magnitude")):
        grouping, selected = Grouping(group, 0.5), {}

        def planes(grouping: Grouping = grouping, ties: str = ties, found: dict = selected) -> None:
            found["planes"] = votes.most_voted(weight, grouping, ties).mask

        def plain(grouping: Grouping = grouping, ties: str = ties, found: dict = selected) -> None:
            found["counts"] = most_voted(counts, weight, grouping, ties).mask

        timings = alternate({"planes": planes, "counts": plain}, repeats)
        assert torch.equal(selected["planes"], selected["counts"])
        results.append(
            {"group": group, "ties": ties, "n_participants": n_participants, "shape": shape}
            | {name: timing.as_json() for name, timing in timings.items()}
            | {"counts_times_planes": timings["counts"].seconds / timings["planes"].seconds}
            | {"cpu_counts_times_planes": timings["counts"].cpu_seconds / timings["planes"].cpu_seconds}
        )
    return results


def tables(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Build the rows of each table, by title, for the terminal and the page."""
    adding, selection = results["adding"], results["selection"]
    found: dict[str, list[dict[str, Any]]] = {}
    gb_per_second = adding["copy_bytes_per_second"] / 1e9
    title = f"Adding one mask of {adding['n_weights']:,} weights (copy: {gb_per_second:.3g} GB/s, both ways)"
    found[title] = [
        {
            "": name,
            "ms": row["seconds"] * 1e3,
            "CPU ms": row["cpu_seconds"] * 1e3,
            "times planes": row["times_planes"],
            "times planes, CPU": row["times_planes_cpu"],
            "of the bandwidth": row.get("bandwidth_fraction", ""),
        }
        for name, row in adding["contenders"].items()
    ]
    found[f"Participants, one mask of {adding['n_weights']:,} weights at a time"] = [
        {
            "participants": row["n_participants"],
            "seconds": row["seconds"],
            "CPU s": row["cpu_seconds"],
            "ms a mask": row["ms_per_mask"],
            "CPU ms a mask": row["cpu_ms_per_mask"],
            "votes MB": row["votes_bytes"] / 1e6,
            "bits a weight": row["votes_bits_per_weight"],
            "peak MB, all": row["peak_rss_bytes"] / 1e6,
            "of these, masks": row["masks_bytes"] / 1e6,
        }
        for row in results["participants"]
    ]
    found["Packing"] = [
        {"": name, "ms": row["seconds"] * 1e3, "GB/s of bytes, one a weight": row["gb_per_second"]}
        for name, row in results["packing"].items()
    ]
    found["The most voted half of {} x {} weights".format(*selection[0]["shape"])] = [
        {
            "participants": row["n_participants"],
            "group": row["group"],
            "ties": row["ties"],
            "planes ms": row["planes"]["seconds"] * 1e3,
            "counts ms": row["counts"]["seconds"] * 1e3,
            "counts / planes": row["counts_times_planes"],
            "the same, CPU": row["cpu_counts_times_planes"],
        }
        for row in selection
    ]
    return found


def main() -> None:
    options = arguments("Votes in bit planes against unpack-and-add.", repeats=7)
    about = machine()
    n_weights = 6_400_000 if options.quick else 100_000_000
    sweep = (10, 20, 40) if options.quick else (125, 250, 500, 1000)
    shape = (576, 1536) if options.quick else (4096, 4096)
    results = {
        "adding": bench_adding(n_weights, options.repeats),
        "participants": [in_fresh_process(add_participants, m, n_weights, options.threads) for m in sweep],
        "packing": bench_packing(n_weights, options.repeats),
        "selection": bench_selection(shape, 8, 2) + bench_selection(shape, 1000, 2),
    }
    for title, rows in tables(results).items():
        print_table(title, rows)
    print_json("votes", options, about, **results)


if __name__ == "__main__":
    main()
