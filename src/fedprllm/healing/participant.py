"""One participant of healing: its windows, those held out, and what it contributes to a round."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedprllm.healing.config import HealConfig
from fedprllm.pruning.held_out import divided
from fedprllm.pruning.participant import Participant

__all__ = ["HealingText"]


class HealingText:
    """A participant's windows, divided into those to train on and those held out.

    Args:
        participant: Holds the windows.

    Attributes:
        name: The participant's name.
        training: Windows whose gradients it shares, int64 [n, window_length].
        held_out: Windows on which it only measures the loss; none if it has a single window.
    """

    def __init__(self, participant: Participant) -> None:
        self.name = participant.name
        self.training, self.held_out = divided(participant.windows)

    def windows_of(self, number: int, config: HealConfig) -> Sequence[Tensor]:
        """Windows whose gradient it shares in a round: the next ones, and at the end the first ones again.

        After the last step there is nothing left to train for.
        """
        if number >= config.rounds:
            return []
        first = number * config.round_windows
        return [self.training[(first + i) % len(self.training)] for i in range(config.round_windows)]

    def held_out_of(self, number: int, config: HealConfig) -> Sequence[Tensor]:
        """Windows on which it measures the loss in a round."""
        return list(self.held_out) if config.is_check(number) else []
