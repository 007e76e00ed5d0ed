"""From what a user names as participants to participants; mistakes are refused before the computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedprllm.calibration import evaluation_windows, partition, token_windows
from fedprllm.config import PruneConfig
from fedprllm.core.ties import generator
from fedprllm.documents import Documents
from fedprllm.errors import ConfigError, DataError, did_you_mean
from fedprllm.evaluation.perplexity import window_length_for
from fedprllm.files import names_of
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.tokenizer import load_tokenizer
from fedprllm.pruning.participant import Participant

__all__ = [
    "Documents",
    "ParticipantInputs",
    "PooledData",
    "Source",
    "evaluation_texts",
    "make_participants",
    "name_participants",
    "pool",
]

Source = str | Path | Documents
ParticipantInput = Source | Sequence[Source] | Tensor | Any
PARTITIONS = ("iid", "file", "dirichlet")
_LONGEST_PATH = 1024  # characters


@dataclass(frozen=True)
class PooledData:
    """Text in one place, dealt out to participants as if each had its own: for comparing variants.

    Attributes:
        paths: The text files.
        n_participants: How many participants to make.
        partition: ``iid`` deals windows at random, ``file`` deals whole files, ``dirichlet`` gives the
            participants unequal shares of each file.
        alpha: Concentration of ``dirichlet``: small is unequal, large approaches ``iid``.
    """

    paths: Sequence[Source]
    n_participants: int
    partition: Literal["iid", "file", "dirichlet"] = "iid"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise ConfigError(f"unknown partition {did_you_mean(self.partition, PARTITIONS)}")
        if self.n_participants < 1:
            raise ConfigError(f"participants must be at least 1, found {self.n_participants}")
        if self.alpha <= 0:
            raise ConfigError(f"alpha must be positive, found {self.alpha:g}")
        if isinstance(self.paths, (str, Path)):
            object.__setattr__(self, "paths", [self.paths])
        if not self.paths:
            raise DataError("no data: name at least one text file")


ParticipantInputs = Sequence[ParticipantInput] | Mapping[str, ParticipantInput] | PooledData


def name_participants(participants: ParticipantInputs) -> dict[str, ParticipantInput] | PooledData:
    """Name each participant after its file, or by its number.

    Raises:
        DataError: There are none, or something other than a list or mapping was given.
    """
    if isinstance(participants, PooledData):
        return participants
    if isinstance(participants, (Tensor, str, Path)):
        found = "one tensor" if isinstance(participants, Tensor) else f"'{participants}'"
        raise DataError(f"participants must be a list with one item each, found {found}: wrap it in a list")
    if not isinstance(participants, (Mapping, Sequence)):
        raise DataError(
            "participants must be a list or a mapping with one item each, found "
            f"{type(participants).__name__}"
        )
    if not len(participants):
        raise DataError("no participants: give at least one text file or token tensor")
    if isinstance(participants, Mapping):
        names = names_of([str(name).replace("/", "-") for name in participants])
        items = zip(names, participants.values(), strict=True)
        return {name: _understood(name, item) for name, item in items}
    sources = [
        item if isinstance(item, (str, Path)) else f"participant-{number}"
        for number, item in enumerate(participants)
    ]
    named = dict(zip(names_of(sources), participants, strict=True))
    return {name: _understood(name, item) for name, item in named.items()}


def _understood(name: str, item: Any) -> ParticipantInput:
    """A participant's item as one path, a list of paths, documents or a tensor of token ids.

    Raises:
        DataError: It is none of what a participant may be given as.
    """
    if isinstance(item, (str, Path, Documents, Tensor)):
        return item
    if isinstance(item, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(item))
    if hasattr(item, "features") and hasattr(item, "column_names"):
        return Documents.of_dataset(item)
    if isinstance(item, (list, tuple)) and item:
        return _list_understood(name, item)
    raise DataError(
        f"participant '{name}' must be a path, a list of paths, Documents([...]), a dataset with a column "
        f"'text' or token ids [n_windows, window_length], found {type(item).__name__}"
        f"{' without items' if isinstance(item, (list, tuple)) else ''}"
    )


def _list_understood(name: str, items: Sequence[Any]) -> ParticipantInput:
    if all(isinstance(item, (Documents, Path)) for item in items):
        return list(items)
    if all(isinstance(item, (list, tuple)) for item in items):
        try:
            return torch.tensor(items)
        except (TypeError, ValueError):
            raise DataError(
                f"the token ids of participant '{name}' must be lists of one length that hold whole numbers"
            ) from None
    if not all(isinstance(item, (str, Path)) for item in items):
        raise DataError(
            f"the list of participant '{name}' holds {type(items[0]).__name__}: expected strings or paths"
        )
    if all(_may_be_a_path(item) for item in items):
        return list(items)
    if not any(_may_be_a_path(item) for item in items):
        return Documents([str(item) for item in items])
    raise DataError(
        f"the list of participant '{name}' mixes paths and text: give paths, or Documents([...]) for text"
    )


def _may_be_a_path(item: str | Path) -> bool:
    """Whether a string names a file, even a missing one, rather than being a text itself."""
    if isinstance(item, Path) or item.startswith("hf:"):
        return True
    if not item.strip() or "\n" in item or len(item) > _LONGEST_PATH:
        return False
    if Path(item).expanduser().exists():
        return True
    # A sentence has spaces and ends without a suffix; a mistyped path has a suffix or no space.
    return bool(Path(item).suffix.strip(".").isalnum()) or " " not in item.strip()


def make_participants(
    model: BlockwiseModel, named: Mapping[str, ParticipantInput] | PooledData, config: PruneConfig
) -> tuple[list[Participant], PruneConfig]:
    """Read the participants' texts into token windows.

    Returns:
        The participants in the order of their names, and the configuration with its window length resolved.

    Raises:
        DataError: A text or a tensor cannot be used; fewer windows than participants.
    """
    items: list[Any] = [] if isinstance(named, PooledData) else list(named.values())
    tensors = [item for item in items if isinstance(item, Tensor)]
    given = {tensor.shape[1] for tensor in tensors if tensor.ndim == 2}
    asked = given.pop() if config.window_length is None and len(given) == 1 else config.window_length
    config = config.model_copy(update={"window_length": window_length_for(model, asked)})
    if isinstance(named, PooledData):
        return _deal_out(model, named, config), config
    tokenizer = load_tokenizer(model.folder) if len(tensors) < len(items) else None
    people = []
    for name, item in named.items():
        if isinstance(item, Tensor):
            people.append(Participant(name, _checked(name, item, model)))
        else:
            sources = [item] if isinstance(item, (str, Path, Documents)) else list(item)
            windows = _windows(sources, tokenizer, config, config.windows)
            people.append(Participant(name, windows, [str(source) for source in sources]))
    # In the order of names, as in a federation over the network: sums of floats depend on it.
    return sorted(people, key=lambda person: person.name), config


def _windows(sources: Sequence[Source], tokenizer: Any, config: PruneConfig, n_windows: int) -> Tensor:
    assert config.window_length is not None
    return token_windows(
        sources,
        tokenizer,
        n_windows=n_windows,
        window_length=config.window_length,
        seed=config.seed,
        bos=config.bos,
    )


def _deal_out(model: BlockwiseModel, data: PooledData, config: PruneConfig) -> list[Participant]:
    tokenizer = load_tokenizer(model.folder)
    n_wanted = config.windows * data.n_participants
    n_each = config.windows if data.partition == "file" else n_wanted
    by_file = [_windows([path], tokenizer, config, n_each) for path in data.paths]
    if n_wanted and data.partition != "file":
        by_file = _sample(by_file, n_wanted, config.seed)
    parts = partition(by_file, data.n_participants, method=data.partition, alpha=data.alpha, seed=config.seed)
    sources = [str(path) for path in data.paths]
    return [Participant(f"participant-{number}", part, sources) for number, part in enumerate(parts)]


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
    """One participant that holds all windows, in an order that does not depend on the participants' order."""
    lengths = {person.windows.shape[1] for person in people}
    if len(lengths) > 1:
        raise DataError(f"centralized pools all windows: expected one length, found {sorted(lengths)}")
    by_text = sorted(people, key=lambda person: person.fingerprint)
    windows = torch.cat([person.windows for person in by_text])
    return Participant("centralized", windows, [source for person in by_text for source in person.sources])


def named_texts(texts: Source | Sequence[Source] | Mapping[str, Source]) -> dict[str, Source]:
    """Texts by name; a string or a path is one text."""
    if isinstance(texts, Mapping):
        return dict(texts)
    listed = [texts] if isinstance(texts, (str, Path, Documents)) else list(texts)
    return dict(zip(names_of([str(text) for text in listed]), listed, strict=True))


def evaluation_texts(
    model: BlockwiseModel, texts: Source | Sequence[Source] | Mapping[str, Source], config: PruneConfig
) -> dict[str, list[Tensor]]:
    """Windows of the texts to evaluate on, by name."""
    named = named_texts(texts)
    if not named:
        return {}
    tokenizer = load_tokenizer(model.folder)
    assert config.window_length is not None
    return {
        name: evaluation_windows([path], tokenizer, window_length=config.window_length, bos=config.bos)
        for name, path in named.items()
    }
