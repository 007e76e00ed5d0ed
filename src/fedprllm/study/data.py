"""The participants of a cell and the texts it is measured on, all read before anything is computed."""

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

_CHARACTERS_PER_TOKEN = 8  # more than any text has: enough characters for the tokens to hold out
_HELD_OUT_SHARE = 0.2  # of a domain's documents, at most


class StudyData:
    """Participants by seed, number and partition, and texts to measure on by partition.

    Args:
        model: The model whose tokenizer and limits count.
        study: Names the texts.
        folder: Where the parts of the domains are written.

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
        """What a cell is measured on: held-out text of every domain, or the texts of the study."""
        return self._texts["iid" if cell.partition == "iid" else "domain"]

    def participants(self, cell: Cell) -> list[Participant]:
        """The participants of a cell.

        Fewer participants are the first of more, so that what these computed serves both.

        Raises:
            DataError: Too little text for all windows.
        """
        key = (cell.partition, cell.config.seed, cell.config.windows)
        if key not in self._made:
            self._made[key] = self._make(cell.partition, cell.config)
        participants = self._made[key][: cell.participants]
        for participant in participants:
            # A dirichlet partition gives unequal shares on purpose.
            if len(participant.windows) < cell.config.windows and cell.partition != "dirichlet":
                raise DataError(
                    f"'{participant.name}' ({cell.partition}) has text for {len(participant.windows)} windows"
                    f" of {self._study.window_length} tokens: {cell.config.windows} were asked for; give "
                    "more text, or ask for fewer or shorter windows or fewer participants"
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
    """Write the documents of a domain into two files: for calibration, and held out."""
    documents = read_documents(source)
    if len(documents) < 10:
        # Few and long, a book for example: its paragraphs are the smallest parts that make sense alone.
        documents = [part for document in documents for part in document.split("\n\n") if part.strip()]
    order = torch.randperm(len(documents), generator=generator("held out", name)).tolist()
    shuffled = [documents[place] for place in order]
    n_held_out, n_characters = 0, 0
    while n_held_out < _HELD_OUT_SHARE * len(shuffled) and n_characters < _CHARACTERS_PER_TOKEN * eval_tokens:
        n_characters += len(shuffled[n_held_out])
        n_held_out += 1
    if len(shuffled) - n_held_out < 1:
        raise DataError(f"{source} has too little text to hold out a part of it: expected several documents")
    parts = {"held-out": shuffled[:n_held_out], "calibration": shuffled[n_held_out:]}
    paths = {}
    for part, texts in parts.items():
        paths[part] = folder / f"{name}-{part}.jsonl"
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        write_text(paths[part], "".join(lines))
    return paths["calibration"], paths["held-out"]
