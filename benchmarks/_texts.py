"""Participants with the demonstration's four kinds of text, and held-out text of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedprllm.demo.texts import demo_texts
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.tokenizer import load_tokenizer
from fedprllm.pruning.participant import Participant
from fedprllm.text.windows import evaluation_windows

__all__ = ["Texts", "read_texts", "windows_of"]


class Texts(NamedTuple):
    """Participants, and held-out token windows by kind of text."""

    participants: list[Participant]
    held_out: dict[str, list[Tensor]]


def read_texts(
    model: BlockwiseModel, folder: Path, n: int, windows: int, length: int, held_out_windows: int = 12
) -> Texts:
    """Deal the calibration text out to ``n`` participants, who have one kind of text each, in turn."""
    files = demo_texts(folder)
    kinds = list(files)
    rounds = -(-n // len(kinds))
    dealt = {kind: windows_of(model, files[kind][0], rounds * windows, length) for kind in kinds}
    participants = [
        Participant(
            f"{index:02d}-{kinds[index % len(kinds)]}",
            dealt[kinds[index % len(kinds)]][index // len(kinds) * windows :][:windows],
        )
        for index in range(n)
    ]
    held_out = {kind: list(windows_of(model, files[kind][1], held_out_windows, length)) for kind in kinds}
    return Texts(participants, held_out)


def windows_of(model: BlockwiseModel, file: Path, n: int, length: int) -> Tensor:
    """The first ``n`` windows of a text, int64 [n, length]."""
    found = evaluation_windows(
        [file],
        load_tokenizer(model.folder),
        window_length=length,
        bos="auto",
        max_tokens=n * length,
        vocabulary_size=model.vocabulary_size,
    )
    return torch.stack([window for window in found if len(window) == length])
