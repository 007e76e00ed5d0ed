"""Dealing windows out to participants, as if each had its own text: for comparing variants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fedprllm.core.ties import generator
from fedprllm.errors import ConfigError, DataError, did_you_mean

__all__ = ["partition"]


def partition(
    windows_by_file: Sequence[Int[Tensor, "_ window_length"]],
    n_participants: int,
    *,
    method: Literal["iid", "file", "dirichlet"],
    alpha: float,
    seed: int,
) -> list[Int[Tensor, "_ window_length"]]:
    """Deal windows out to participants: each goes to exactly one, and everyone gets at least one.

    ``iid`` deals all windows out at random, sizes differ by at most one. ``file`` gives file i to participant
    ``i mod n``. ``dirichlet`` draws for each file its shares ``p ~ Dir(alpha, ..., alpha)`` over the
    participants (Hsu et al. 2019, with files for classes); small alpha: each file to few participants.

    Args:
        windows_by_file: the windows of each file.
        n_participants: how many to deal out to.
        method: a key of the table above.
        alpha: concentration of ``dirichlet``; the others do not look at it.
        seed: of the draw.

    Raises:
        DataError: fewer windows, or for ``file`` fewer files with windows, than participants.
        ConfigError: the method is unknown, or a number is out of range.
    """
    if method not in _PARTITIONS:
        raise ConfigError(f"unknown value of partition: {did_you_mean(method, _PARTITIONS)}")
    if n_participants < 1:
        raise ConfigError(f"the number of participants must be at least 1, found {n_participants}")
    sizes = [len(windows) for windows in windows_by_file]
    if sum(sizes) < n_participants:
        raise DataError(
            f"{n_participants} participants need at least one window each, found {sum(sizes)} in "
            f"{len(sizes)} files. Add text, shorten the windows or take fewer participants"
        )
    owners = _PARTITIONS[method](sizes, n_participants, alpha, seed)
    windows = torch.cat(list(windows_by_file))
    return [windows[owners == participant] for participant in range(n_participants)]


# A function (sizes, n_participants, alpha, seed) -> owners: the participant of each window, files in order.
Owners = Int[Tensor, " n_windows"]


def _iid(sizes: Sequence[int], n_participants: int, alpha: float, seed: int) -> Owners:  # noqa: ARG001
    n_windows = sum(sizes)
    owners = torch.empty(n_windows, dtype=torch.int64)
    order = torch.randperm(n_windows, generator=generator("partition iid", seed))
    owners[order] = torch.arange(n_windows) % n_participants
    return owners


def _by_file(sizes: Sequence[int], n_participants: int, alpha: float, seed: int) -> Owners:  # noqa: ARG001
    owners = torch.repeat_interleave(torch.arange(len(sizes)) % n_participants, torch.tensor(sizes))
    if len(set(owners.tolist())) < n_participants:
        raise DataError(
            f"partition 'file' gives whole files: {n_participants} participants need one with text each, "
            f"found {sum(map(bool, sizes))}. Add files, take fewer participants or another partition"
        )
    return owners


def _dirichlet(sizes: Sequence[int], n_participants: int, alpha: float, seed: int) -> Owners:
    if not 0 < alpha < math.inf:
        raise ConfigError(f"alpha must be greater than 0 and finite, found {alpha:g}: for example 0.5")
    random = np.random.default_rng(generator("partition dirichlet", seed).initial_seed())
    everyone = np.arange(n_participants)
    owners = np.concatenate(
        [
            random.permutation(
                np.repeat(
                    everyone, _largest_remainder(size, random.dirichlet(np.full(n_participants, alpha)))
                )
            )
            for size in sizes
        ]
    )
    for participant in everyone:
        if participant not in owners:
            richest = np.bincount(owners, minlength=n_participants).argmax()
            owners[np.flatnonzero(owners == richest)[-1]] = participant
    return torch.from_numpy(owners)


def _largest_remainder(total: int, shares: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to ``total``: ``floor(total * share)``, the rest to the largest remainders."""
    exact = total * shares
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    largest_first = np.argsort(counts - exact, kind="stable")
    counts[largest_first[: total - counts.sum()]] += 1
    return counts


_PARTITIONS: dict[str, Callable[[Sequence[int], int, float, int], Owners]] = {
    "iid": _iid,
    "file": _by_file,
    "dirichlet": _dirichlet,
}
