"""Sums of a healing's rounds under masks, with all participants in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedprllm.healing.config import HealConfig
from fedprllm.healing.round_sums import RoundSums
from fedprllm.pruning.secure_sums import SecureSession, terms_of

__all__ = ["SecureRounds"]


class SecureRounds:
    """All parties of one session: every round is a sum.

    Args:
        names: The participants.
        config: The resolved options of healing.

    Raises:
        SecureError: There are fewer than three participants.
    """

    def __init__(self, names: Sequence[str], config: HealConfig) -> None:
        n_rounds = config.rounds + 1
        samples = {name: range(n_rounds) for name in names}
        about = {"heal": config.model_dump(mode="json")}
        self._session = SecureSession(terms_of(samples, n_rounds, about))

    def total(self, number: int, by_name: Mapping[str, RoundSums]) -> RoundSums:
        """What the server learns of a round: the sum over participants."""
        name_of_sum = f"block {number:04d}"
        for name, sums in by_name.items():
            self._session.hide(name_of_sum, name, sums.words.numpy().view(np.uint64))
        words, _ = self._session.reveal(name_of_sum)
        return RoundSums(torch.from_numpy(words.view(np.int64).copy()))
