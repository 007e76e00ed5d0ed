"""What a user may name as participants, turned into participants, with every refusal before the compute."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.ties import generator
from fedprllm.errors import ConfigError, DataError, FedprllmWarning, did_you_mean
from fedprllm.evaluation.perplexity import window_length_for
from fedprllm.files import distinct_names, names_of
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.fingerprints import model_digest
from fedprllm.models.identity import model_identity
from fedprllm.models.tokenizer import load_tokenizer
from fedprllm.progress import Progress
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.run_folder import versions
from fedprllm.settings import Settings
from fedprllm.text.documents import left_out, say_left_out
from fedprllm.text.partition import partition
from fedprllm.text.sources import (
    Documents,
    Source,
    as_sources,
    describe,
    is_dataset,
    is_path,
    is_plain_text,
    looks_like_text,
    named_sources,
)
from fedprllm.text.windows import evaluation_windows, fingerprint, token_windows

__all__ = [
    "RESERVED_NAMES",
    "Documents",
    "ParticipantInputs",
    "PooledData",
    "Source",
    "check_outside",
    "evaluation_texts",
    "identity_of",
    "make_participants",
    "name_participants",
    "pool",
    "say_notes",
    "sources_of",
]

ParticipantInput = Source | Sequence[Source] | Tensor
PARTITIONS = ("iid", "file", "dirichlet")
# Rows of tables and folders of models that are not a participant's.
RESERVED_NAMES = ("dense", "model", "centralized")
_TOKEN_WINDOWS = ["token windows"]


@dataclass(frozen=True)
class PooledData:
    """Text in one place, dealt out to participants as if each had its own: for comparing variants.

    Attributes:
        paths: The text files; one path, or a list of them.
        n_participants: How many participants to make.
        partition: ``iid`` deals windows at random, ``file`` deals whole files, ``dirichlet`` gives the
            participants unequal shares of each file.
        alpha: Concentration of ``dirichlet``: small is unequal, large approaches ``iid``.
    """

    paths: Source | Sequence[Source]
    n_participants: int
    partition: Literal["iid", "file", "dirichlet"] = "iid"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise ConfigError(f"unknown partition {did_you_mean(self.partition, PARTITIONS)}")
        if isinstance(self.n_participants, bool) or not isinstance(self.n_participants, int):
            raise ConfigError(f"participants must be an integer, found {self.n_participants!r}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
            raise ConfigError(f"alpha must be a number, found {self.alpha!r}")
        if self.n_participants < 1:
            raise ConfigError(f"participants must be at least 1, found {self.n_participants}")
        if self.alpha <= 0:
            raise ConfigError(f"alpha must be positive, found {self.alpha:g}")
        if isinstance(self.paths, (list, tuple)) and not self.paths:
            raise DataError("no data: name at least one text file")
        as_sources(self.paths, "data")


ParticipantInputs = Sequence[ParticipantInput] | Mapping[str, ParticipantInput] | PooledData


def name_participants(
    participants: ParticipantInputs,
) -> dict[str, Tensor | list[Source]] | PooledData:
    """Name each participant after its file, or by its number, and check the type of what it was given.

    An item is a path, `Documents`, a `datasets.Dataset`, integer token ids [n_windows, window_length] (a
    tensor, an array of NumPy, or a list of equally long lists), or a list of paths, `Documents` and datasets.
    A list of strings that name no files and plainly are text counts as `Documents`.

    Raises:
        DataError: There are none, or something else was given.
    """
    if isinstance(participants, PooledData):
        return participants
    one = isinstance(participants, (str, os.PathLike, Documents, Tensor, np.ndarray))
    if one or is_dataset(participants):
        raise DataError(
            f"participants must be a list with one item each, found {_found(participants)}: wrap it in a list"
        )
    if not isinstance(participants, (list, tuple, Mapping)):
        raise DataError(
            "participants must be a list with one item each, or a mapping from names to them, found "
            f"{type(participants).__name__}: make it a list first"
        )
    if not participants:
        raise DataError("no participants: give at least one text file or token tensor")
    if isinstance(participants, Mapping):
        items: list[Any] = list(participants.values())
        names = distinct_names([str(name) for name in participants], RESERVED_NAMES)
    else:
        items = list(participants)
        labels = [_label(item) or f"participant-{number}" for number, item in enumerate(items)]
        names = names_of(labels, RESERVED_NAMES)
    return {name: _item(item, f"participant '{name}'") for name, item in zip(names, items, strict=True)}


def _label(item: object) -> str | None:
    """The path of a text, unless it is text itself, which must not become a name."""
    if not isinstance(item, (str, os.PathLike)):
        return None
    path = os.fspath(item)
    return path if is_path(path) or not (looks_like_text(path) or is_plain_text(path)) else None


def _found(participants: object) -> str:
    if isinstance(participants, (Tensor, np.ndarray)):
        return "one tensor"
    return f"one {type(participants).__name__}"


def _item(item: Any, whose: str) -> Tensor | list[Source]:
    if isinstance(item, Tensor):
        return item
    if isinstance(item, np.ndarray):
        return _from_array(item, whose)
    if isinstance(item, (list, tuple)) and item:
        if all(isinstance(one, str) for one in item):
            return _paths_or_texts(item, whose)
        if any(isinstance(one, (list, tuple, np.ndarray, Tensor, int, float, np.number)) for one in item):
            return _from_lists(item, whose)
    return as_sources(item, whose)


def _from_array(array: np.ndarray, whose: str) -> Tensor:
    if array.dtype.kind not in "iu":
        raise DataError(_not_windows(whose, f"{array.dtype} {array.shape}"))
    return torch.from_numpy(array.astype(np.int64))


def _from_lists(rows: Sequence[Any], whose: str) -> Tensor:
    try:
        arrays = [np.asarray(row.cpu() if isinstance(row, Tensor) else row) for row in rows]
    except ValueError:
        raise DataError(_not_windows(whose, "lists that are nested unevenly")) from None
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1 and all(len(shape) == 1 for shape in shapes):
        lengths = ", ".join(str(shape[0]) for shape in shapes[:10])
        raise DataError(f"the token windows of {whose} must have one length, found {lengths} tokens")
    if len(shapes) > 1 or len(shapes[0]) != 1 or any(array.dtype.kind not in "iu" for array in arrays):
        kinds = ", ".join(sorted({type(row).__name__ for row in rows}))
        raise DataError(_not_windows(whose, f"a list of {kinds}"))
    return torch.from_numpy(np.stack(arrays).astype(np.int64))


def _not_windows(whose: str, found: str) -> str:
    return f"the token windows of {whose} must be integers [n_windows, window_length], found {found}"


def _paths_or_texts(texts: Sequence[str], whose: str) -> list[Source]:
    """Paths if all of them are; documents if all of them plainly are text and none is a path."""
    paths = [is_path(text) for text in texts]
    plain = [is_plain_text(text) for text in texts]
    if all(paths):
        return list(texts)
    if all(plain) and not any(paths):
        return [Documents(texts)]
    if any(plain) or (len(texts) > 1 and not any(paths)):
        place = paths.index(False)
        raise DataError(
            f"{whose}: a list of {len(texts)} strings must be paths or texts; item {place} is no file or "
            "folder that exists, and not all items plainly are text. Correct the path, or give texts as "
            "fedprllm.Documents([...])"
        )
    # A path that does not exist is refused when it is read, with the names beside it.
    return as_sources(list(texts), whose)


def make_participants(
    model: BlockwiseModel, named: Mapping[str, ParticipantInput] | PooledData, config: PruneConfig
) -> tuple[list[Participant], PruneConfig]:
    """Read everyone's text into token windows.

    Returns:
        The participants in the order of their names, and the configuration with its window length resolved.

    Raises:
        DataError: A text or a tensor cannot be used; fewer windows than participants.
        ModelError: The model has no tokenizer, or one that gives nothing.
    """
    items: list[Any] = [] if isinstance(named, PooledData) else list(named.values())
    tensors = [item for item in items if isinstance(item, Tensor)]
    given = {tensor.shape[1] for tensor in tensors if tensor.ndim == 2}
    asked = given.pop() if config.window_length is None and len(given) == 1 else config.window_length
    config = config.model_copy(update={"window_length": window_length_for(model, asked)})
    if isinstance(named, PooledData):
        return _deal_out(model, named, config), config
    tokenizer = load_tokenizer(model.folder) if len(tensors) < len(items) else None
    members = []
    for name, item in named.items():
        if isinstance(item, Tensor):
            members.append(Participant(name, _checked(name, item, model), _TOKEN_WINDOWS))
        else:
            sources = as_sources(item, f"participant '{name}'")
            windows = _windows(model, sources, tokenizer, config, config.windows)
            member = Participant(name, windows, [describe(source) for source in sources])
            member.notes = [*_fewer_windows(member, config.windows), *left_out(sources)]
            members.append(member)
    # In the order of names, as in a federation over the network: sums of floats depend on it.
    return sorted(members, key=lambda member: member.name), config


def _windows(
    model: BlockwiseModel,
    sources: Sequence[Source],
    tokenizer: Any,
    config: PruneConfig,
    n_windows: int,
    none_allowed: bool = False,
) -> Tensor:
    assert config.window_length is not None
    return token_windows(
        sources,
        tokenizer,
        n_windows=n_windows,
        window_length=config.window_length,
        seed=config.seed,
        bos=config.bos,
        vocabulary_size=model.vocabulary_size,
        none_allowed=none_allowed,
    )


def _deal_out(model: BlockwiseModel, data: PooledData, config: PruneConfig) -> list[Participant]:
    tokenizer = load_tokenizer(model.folder)
    sources = as_sources(data.paths, "data")
    n_wanted = config.windows * data.n_participants
    n_each = config.windows if data.partition == "file" else n_wanted
    # One short file among others takes nothing from a draw over all of them; dealt out whole, it would.
    short_allowed = data.partition != "file" and len(sources) > 1
    by_file = [_windows(model, [source], tokenizer, config, n_each, short_allowed) for source in sources]
    used = [describe(source) for source, windows in zip(sources, by_file, strict=True) if len(windows)]
    by_file = [windows for windows in by_file if len(windows)]
    if not by_file:
        raise DataError(
            f"text too short: none of the {len(sources)} texts gives one window of {config.window_length} "
            "tokens. Add text or use a smaller --window-length"
        )
    if n_wanted and data.partition != "file":
        by_file = _sample(by_file, n_wanted, config.seed)
    parts = partition(by_file, data.n_participants, method=data.partition, alpha=data.alpha, seed=config.seed)
    members = [Participant(f"participant-{number}", part, used) for number, part in enumerate(parts)]
    notes = left_out(sources)
    for member in members:
        # Dirichlet gives unequal shares on purpose.
        fewer = [] if data.partition == "dirichlet" else _fewer_windows(member, config.windows)
        member.notes, notes = [*fewer, *notes], []
    return members


def _sample(by_file: list[Tensor], n_windows: int, seed: int) -> list[Tensor]:
    """Keep ``n_windows`` of all files' windows, drawn evenly and in their order."""
    sizes = [len(windows) for windows in by_file]
    kept = torch.zeros(sum(sizes), dtype=torch.bool)
    kept[torch.randperm(sum(sizes), generator=generator(seed, "pool"))[:n_windows]] = True
    chosen = [windows[keep] for windows, keep in zip(by_file, torch.split(kept, sizes), strict=True)]
    return [windows for windows in chosen if len(windows)]


def _checked(name: str, windows: Tensor, model: BlockwiseModel) -> Tensor:
    whose = f"the token windows of participant '{name}'"
    if windows.ndim != 2 or windows.is_floating_point() or windows.dtype == torch.bool:
        raise DataError(
            f"{whose} must be integers [n_windows, window_length], found {windows.dtype} "
            f"{tuple(windows.shape)}"
        )
    if windows.shape[0] == 0 or windows.shape[1] < 2:
        raise DataError(
            f"{whose} have shape {tuple(windows.shape)}: expected at least one window of at least 2 tokens"
        )
    window_length_for(model, windows.shape[1])
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= model.vocabulary_size:
        raise DataError(
            f"{whose} hold ids from {low} to {high}: the model's vocabulary has 0 to "
            f"{model.vocabulary_size - 1}; were they made with another tokenizer?"
        )
    return windows.to("cpu", torch.int64)


def pool(people: Sequence[Participant]) -> Participant:
    """One participant that holds everyone's windows, in an order that no one's place in a list changes."""
    lengths = {person.windows.shape[1] for person in people}
    if len(lengths) > 1:
        raise DataError(f"centralized pools all windows: expected one length, found {sorted(lengths)}")
    by_text = sorted(people, key=lambda person: person.fingerprint)
    windows = torch.cat([person.windows for person in by_text])
    return Participant("centralized", windows, [source for person in by_text for source in person.sources])


def evaluation_texts(
    model: BlockwiseModel,
    texts: Source | Sequence[Source] | Mapping[str, Source],
    config: PruneConfig,
) -> dict[str, list[Tensor]]:
    """Windows of the texts to evaluate on, by name.

    Raises:
        DataError: A text cannot be used.
        ModelError: The model has no tokenizer, or one that gives nothing.
    """
    named = named_sources(texts)
    if not named:
        return {}
    tokenizer = load_tokenizer(model.folder)
    assert config.window_length is not None
    say_left_out([source for sources in named.values() for source in sources])
    return {
        name: evaluation_windows(
            sources,
            tokenizer,
            window_length=config.window_length,
            bos=config.bos,
            vocabulary_size=model.vocabulary_size,
        )
        for name, sources in named.items()
    }


def check_outside(out: Path, sources: Iterable[Source]) -> None:
    """Refuse a folder for output inside a folder of text: its files would be read as text.

    Raises:
        ConfigError: It is.
    """
    where = out.expanduser().resolve()
    for source in sources:
        if isinstance(source, (str, Path)) and (folder := Path(source).expanduser()).is_dir():
            # Hidden folders are not read.
            inside = where.is_relative_to(folder.resolve()) and not any(
                part.startswith(".") for part in where.relative_to(folder.resolve()).parts
            )
            if inside:
                raise ConfigError(
                    f"{out} lies in {folder}, which is read as text: what a run writes there would be taken "
                    "for text. Choose a folder elsewhere with --out"
                )


def sources_of(
    named: Mapping[str, Tensor | list[Source]] | PooledData,
    eval_texts: Source | Sequence[Source] | Mapping[str, Source],
) -> Iterator[Source]:
    """Everything that is read as text."""
    if isinstance(named, PooledData):
        yield from as_sources(named.paths)
    else:
        for item in named.values():
            yield from () if isinstance(item, Tensor) else item
    for sources in named_sources(eval_texts).values():
        yield from sources


def identity_of(
    config: Settings,
    source: str,
    model: BlockwiseModel,
    members: Sequence[Participant],
    tests: Mapping[str, Sequence[Tensor]],
    progress: Progress,
) -> dict[str, Any]:
    """Everything that determines what a run in one process computes, as JSON values.

    Args:
        config: The resolved configuration.
        source: The model as the user named it.
        model: The model.
        members: The participants.
        tests: Windows of the texts to evaluate on, by name.
        progress: Notified of every block whose weights are read.
    """
    return {
        "config": config.model_dump(mode="json"),
        "model": {
            "source": source,
            "fingerprint": model_digest(model_identity(model, progress)).hex(),
        },
        "participants": {member.name: member.describe().as_json() for member in members},
        "evaluation": {name: fingerprint(torch.cat(list(text))) for name, text in tests.items()},
        "versions": versions(),
    }


def _fewer_windows(participant: Participant, asked: int) -> list[str]:
    """One sentence if a participant has text for fewer windows than were asked for."""
    n_windows, length = participant.windows.shape
    if n_windows >= asked:
        return []
    return [
        f"{participant.name} is calibrated on {n_windows} windows of {length} tokens; {asked} were asked for"
    ]


def say_notes(participants: Sequence[Participant]) -> list[str]:
    """Warn of everything that the owners of the texts should know, and return the sentences.

    Warns:
        FedprllmWarning: A participant has too little text, or files of its folder were left out.
    """
    notes = [note for participant in participants for note in participant.notes]
    for note in notes:
        warnings.warn(FedprllmWarning(note), stacklevel=3)
    return notes
