"""The participants of each cell and the texts to measure on, all read before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.ties import generator
from fedprllm.errors import DataError
from fedprllm.files import atomic_path, names_of
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.fingerprints import model_digest
from fedprllm.models.identity import model_identity
from fedprllm.models.tokenizer import load_tokenizer
from fedprllm.pruning.inputs import RESERVED_NAMES, PooledData, make_participants
from fedprllm.pruning.participant import Participant
from fedprllm.study.questions import BY_DOMAIN, STRANGERS, Cell, StudyConfig, cells_of
from fedprllm.study.strangers import generated_windows, random_windows
from fedprllm.text.documents import Part, parts_of, say_left_out
from fedprllm.text.windows import evaluation_windows

__all__ = ["StudyData", "split"]

_RESERVED = (*RESERVED_NAMES, *STRANGERS)
_CHARACTERS_PER_TOKEN = 8  # more than in any real text, so the held-out part has enough tokens
_HELD_OUT_SHARE = 0.2  # maximum share of a domain's documents
_FEW = 10  # documents; a few long ones, such as a book, are split into their paragraphs


@dataclass(frozen=True)
class _Dealt:
    """Everything that the windows of a cell's participants depend on besides their number."""

    partition: str
    seed: int
    windows: int
    window_length: int | None
    bos: str

    @classmethod
    def of(cls, cell: Cell) -> _Dealt:
        config = cell.config
        return cls(cell.partition, config.seed, config.windows, config.window_length, config.bos)


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
        self._model, self._study, self._folder = model, study, folder
        self._tokenizer = load_tokenizer(model.folder)
        say_left_out([*study.data, *study.domains, *study.public, *study.eval])
        self._made: dict[_Dealt, list[Participant]] = {}
        self._largest: dict[_Dealt, int] = {}
        for cell in cells_of(study):
            dealt = _Dealt.of(cell)
            self._largest[dealt] = max(self._largest.get(dealt, 0), cell.participants)
        self._domains = {
            name: split([source], name, folder, study.eval_tokens)
            for name, source in zip(names_of(study.domains, _RESERVED), study.domains, strict=True)
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
        dealt = _Dealt.of(cell)
        if dealt not in self._made:
            largest = max(self._largest.get(dealt, 0), cell.participants)
            self._made[dealt] = self._make(cell.partition, cell.config, largest)
        participants = self._made[dealt][: cell.participants]
        assert len(participants) == cell.participants, "a cell has as many participants as its label says"
        for participant in participants:
            # A dirichlet partition is meant to give unequal shares.
            if len(participant.windows) < cell.config.windows and cell.partition != "dirichlet":
                raise DataError(
                    f"participant '{participant.name}' ({cell.partition}) has text for "
                    f"{len(participant.windows)} windows of {cell.config.window_length} tokens, expected "
                    f"{cell.config.windows}: provide more text, or choose fewer windows, shorter windows or "
                    "fewer participants"
                )
        return participants

    def _make(self, partition: str, config: PruneConfig, n: int) -> list[Participant]:
        calibration = {name: parts[0] for name, parts in self._domains.items()}
        if partition in BY_DOMAIN:
            members = [] if partition in STRANGERS else self._each(calibration, config)
            return members if partition == "domain" else [*members, self._stranger(partition, config)]
        sources: Sequence[str | Path] = self._study.data if partition == "iid" else list(calibration.values())
        data = PooledData(sources, n, "iid" if partition == "iid" else "dirichlet", self._study.alpha)
        return make_participants(self._model, data, config)[0]

    def _each(self, named: Mapping[str, Any], config: PruneConfig) -> list[Participant]:
        return make_participants(self._model, named, config)[0]

    def _stranger(self, partition: str, config: PruneConfig) -> Participant:
        """A participant with text that nobody has to share, as much as all others have together."""
        assert config.window_length is not None, "a study has one window length"
        n, length, seed = config.windows * len(self._domains), config.window_length, config.seed
        if partition == "random":
            given: Any = random_windows(self._model, n, length, seed)
        elif partition == "generated":
            digest = model_digest(model_identity(self._model)).hex()[:20]
            name = f"generated-{digest}-{config.dtype}-{seed}-{n}x{length}.safetensors"
            given = generated_windows(self._model, n, length, seed, self._folder / name)
        else:
            given = list(self._study.public)
        (member,) = self._each(
            {partition.removeprefix("with-"): given}, config.model_copy(update={"windows": n})
        )
        if len(member.windows) < n:
            raise DataError(
                f"the public text has {len(member.windows)} windows of {length} tokens, expected {n}, as "
                "many as all domains together: provide more text, or choose fewer windows"
            )
        return member


def split(sources: Sequence[str], name: str, folder: Path, eval_tokens: int) -> tuple[Path, Path]:
    """Split the documents of a text into two files: one for calibration, one held out.

    The text is read in pieces: only the lengths of the documents and what is held out are in memory.

    Args:
        sources: Where the text is.
        name: Name of the text, which also chooses what is held out.
        folder: Folder for the files.
        eval_tokens: Number of tokens that the held-out part is to have at least, if a fifth of the documents
            is that much.

    Raises:
        DataError: There is too little text to hold out a part of it.
    """
    lengths = _lengths(_documents(sources, paragraphs=False))
    paragraphs = len(lengths) < _FEW
    if paragraphs:
        lengths = _lengths(_documents(sources, paragraphs=True))
    order = torch.randperm(len(lengths), generator=generator("held out", name)).tolist()
    n_held_out, n_characters = 0, 0
    while n_held_out < _HELD_OUT_SHARE * len(order) and n_characters < _CHARACTERS_PER_TOKEN * eval_tokens:
        n_characters += lengths[order[n_held_out]]
        n_held_out += 1
    if len(order) - n_held_out < 1:
        raise DataError(
            f"{', '.join(sources)} has too little text to hold out a part of it: expected at least two "
            "documents or paragraphs; provide more text"
        )
    places = {place: rank for rank, place in enumerate(order[:n_held_out])}
    calibration, held_out = folder / f"{name}-calibration.jsonl", folder / f"{name}-held-out.jsonl"
    kept: dict[int, list[str]] = {}
    with atomic_path(calibration) as path, _Lines(path) as lines:
        number = -1
        for part in _documents(sources, paragraphs=paragraphs):
            number += part.starts
            if number in places:
                kept.setdefault(places[number], []).append(part.text)
            else:
                lines.add(part)
    with atomic_path(held_out) as path, _Lines(path) as lines:
        for rank in sorted(kept):
            lines.add(Part("".join(kept[rank]), starts=True))
    return calibration, held_out


def _documents(sources: Sequence[str], *, paragraphs: bool) -> Iterator[Part]:
    parts = parts_of(list(sources))
    return _paragraphs(parts) if paragraphs else parts


def _paragraphs(parts: Iterable[Part]) -> Iterator[Part]:
    """The paragraphs of documents, without blank ones."""
    pending = ""
    for part in parts:
        if part.starts:
            yield from _whole(pending)
            pending = ""
        *complete, pending = (pending + part.text).split("\n\n")
        for paragraph in complete:
            yield from _whole(paragraph)
    yield from _whole(pending)


def _whole(paragraph: str) -> Iterator[Part]:
    if paragraph.strip():
        yield Part(paragraph, starts=True)


def _lengths(parts: Iterable[Part]) -> list[int]:
    """Number of characters of each document."""
    lengths: list[int] = []
    for part in parts:
        if part.starts:
            lengths.append(0)
        lengths[-1] += len(part.text)
    return lengths


class _Lines:
    """Writes documents as JSON Lines, part by part."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._is_open = False

    def __enter__(self) -> _Lines:
        return self

    def add(self, part: Part) -> None:
        if part.starts:
            self._end()
            self._file.write('{"text": "')
            self._is_open = True
        self._file.write(json.dumps(part.text, ensure_ascii=False)[1:-1])

    def _end(self) -> None:
        if self._is_open:
            self._file.write('"}\n')

    def __exit__(self, *_: object) -> None:
        self._end()
        self._file.close()
