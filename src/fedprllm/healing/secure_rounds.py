"""Sums of a healing's rounds under masks, with all participants in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedprllm.healing.config import HealConfig
from fedprllm.healing.round_sums import RoundSums
from fedprllm.secure.in_process import Parties
from fedprllm.secure.terms import Terms

__all__ = ["SecureRounds"]


def _name(number: int) -> str:
    return f"round {number:04d}"


class SecureRounds:
    """All parties of one session: every round is a sum.

    Args:
        names: The participants.
        config: The resolved options of healing.

    Raises:
        SecureError: There are fewer than three participants.
    """

    def __init__(self, names: Sequence[str], config: HealConfig) -> None:
        rounds = {_name(number): list(names) for number in range(config.rounds + 1)}
        self._parties = Parties(Terms(rounds, {"heal": config.model_dump(mode="json")}))

    def total(self, number: int, by_name: Mapping[str, RoundSums]) -> RoundSums:
        """What the server learns of a round: the sum over participants."""
        for name, sums in by_name.items():
            self._parties.add(_name(number), name, sums.words.numpy().view(np.uint64))
        words = self._parties.total(_name(number))
        return RoundSums(torch.from_numpy(words.view(np.int64).copy()))
