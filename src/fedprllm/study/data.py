"""The participants of each cell and the texts to measure on, all read before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.ties import generator
from fedprllm.errors import DataError
from fedprllm.files import names_of, write_text
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.tokenizer import load_tokenizer
from fedprllm.pruning.inputs import RESERVED_NAMES, PooledData, make_participants
from fedprllm.pruning.participant import Participant
from fedprllm.study.questions import Cell, StudyConfig
from fedprllm.text.documents import read_documents
from fedprllm.text.windows import evaluation_windows

__all__ = ["StudyData"]

_CHARACTERS_PER_TOKEN = 8  # more than in any real text, so the held-out part has enough tokens
_HELD_OUT_SHARE = 0.2  # maximum share of a domain's documents


class StudyData:
    """The participants of each cell and the texts to measure it on.

    Args:
        model: The model that provides the tokenizer and the limit on the window length.
        study: The study, which names the texts.
        folder: Folder for the calibration and held-out parts of the domains.

    Raises:
        DataError: A text cannot be read or is too short.
    """

    def __init__(self, model: BlockwiseModel, study: StudyConfig, folder: Path) -> None:
        self._model, self._study = model, study
        self._tokenizer = load_tokenizer(model.folder)
        self._made: dict[tuple[str, int, int], list[Participant]] = {}
        self._domains = {
            name: _split(source, name, folder, study.eval_tokens)
            for name, source in zip(names_of(study.domains, RESERVED_NAMES), study.domains, strict=True)
        }
        held_out = {name: parts[1] for name, parts in self._domains.items()}
        self._texts = {
            "iid": self._windows_of(dict(zip(names_of(study.eval), study.eval, strict=True))),
            "domain": self._windows_of(held_out),
        }

    def _windows_of(self, sources: dict[str, str] | dict[str, Path]) -> dict[str, list[Tensor]]:
        study = self._study
        return {
            name: evaluation_windows(
                [source],
                self._tokenizer,
                window_length=study.window_length,
                bos=study.bos,
                max_tokens=study.eval_tokens,
                vocabulary_size=self._model.vocabulary_size,
            )
            for name, source in sources.items()
        }

    def texts(self, cell: Cell) -> dict[str, list[Tensor]]:
        """The texts that a cell is measured on: the study's texts or the held-out text of every domain."""
        return self._texts["iid" if cell.partition == "iid" else "domain"]

    def participants(self, cell: Cell) -> list[Participant]:
        """The participants of a cell.

        A smaller group consists of the first participants of a larger one, so both can use the same walks.

        Raises:
            DataError: There is too little text for the requested number of windows per participant.
        """
        key = (cell.partition, cell.config.seed, cell.config.windows)
        if key not in self._made:
            self._made[key] = self._make(cell.partition, cell.config)
        participants = self._made[key][: cell.participants]
        for participant in participants:
            # A dirichlet partition is meant to give unequal shares.
            if len(participant.windows) < cell.config.windows and cell.partition != "dirichlet":
                raise DataError(
                    f"participant '{participant.name}' ({cell.partition}) has text for "
                    f"{len(participant.windows)} windows of {self._study.window_length} tokens, expected "
                    f"{cell.config.windows}: provide more text, or choose fewer windows, shorter windows or "
                    "fewer participants"
                )
        return participants

    def _make(self, partition: str, config: PruneConfig) -> list[Participant]:
        calibration = {name: parts[0] for name, parts in self._domains.items()}
        if partition == "domain":
            return make_participants(self._model, calibration, config)[0]
        sources: Sequence[str | Path] = self._study.data if partition == "iid" else list(calibration.values())
        n = max(self._study.participants)
        data = PooledData(sources, n, "iid" if partition == "iid" else "dirichlet", self._study.alpha)
        return make_participants(self._model, data, config)[0]


def _split(source: str, name: str, folder: Path, eval_tokens: int) -> tuple[Path, Path]:
    """Split the documents of a domain into two files: one for calibration, one held out."""
    documents = read_documents(source)
    if len(documents) < 10:
        # A few long documents, such as a book: paragraphs are the smallest parts that make sense alone.
        documents = [part for document in documents for part in document.split("\n\n") if part.strip()]
    order = torch.randperm(len(documents), generator=generator("held out", name)).tolist()
    shuffled = [documents[place] for place in order]
    n_held_out, n_characters = 0, 0
    while n_held_out < _HELD_OUT_SHARE * len(shuffled) and n_characters < _CHARACTERS_PER_TOKEN * eval_tokens:
        n_characters += len(shuffled[n_held_out])
        n_held_out += 1
    if len(shuffled) - n_held_out < 1:
        raise DataError(
            f"{source} has too little text to hold out a part of it: expected at least two documents or "
            "paragraphs; provide more text"
        )
    parts = {"held-out": shuffled[:n_held_out], "calibration": shuffled[n_held_out:]}
    paths = {}
    for part, texts in parts.items():
        paths[part] = folder / f"{name}-{part}.jsonl"
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        write_text(paths[part], "".join(lines))
    return paths["calibration"], paths["held-out"]
