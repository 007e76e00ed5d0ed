"""From text to token windows, and from windows to participants.

Documents are joined by blank lines and cut. Token ids are int64; a window is a row of ``window_length`` of
them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from fedprllm.core.ties import generator
from fedprllm.documents import Documents, read_documents
from fedprllm.errors import ConfigError, DataError, did_you_mean

__all__ = [
    "Bos",
    "Tokenizer",
    "adds_bos",
    "evaluation_windows",
    "fingerprint",
    "partition",
    "token_windows",
]

Bos = Literal["auto", "every", "start", "never"]
_SEPARATOR = "\n\n"


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer; every one of transformers has it."""

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """Encode a text; ``input_ids`` of the result are its token ids."""


# --- windows ----------------------------------------------------------------------------------------------


def token_windows(
    sources: Sequence[str | Path | Documents],
    tokenizer: Tokenizer,
    *,
    n_windows: int,
    window_length: int,
    seed: int,
    bos: Bos,
) -> Int[Tensor, "n_windows window_length"]:
    """Cut text into calibration windows that do not overlap.

    Documents are joined by a blank line, since few are as long as a window. All of them are taken in order
    if ``n_windows`` is 0; otherwise they are visited in a seeded random order until they hold enough tokens,
    and a seeded random choice of the resulting windows is kept, in order. Text for fewer windows than asked
    gives fewer: the number is the caller's to see.

    Args:
        sources: What `read_documents` reads, pooled.
        tokenizer: Any of transformers.
        n_windows: Most windows to return; 0 means all.
        window_length: Tokens per window, a BOS token included.
        seed: Seeds the order and the choice.
        bos: ``auto``: in every window if the tokenizer adds one by itself, otherwise none (Gemma needs it in
            every window); ``every``; ``start``: before the joined text only; ``never``.

    Raises:
        DataError: A source cannot be read, or all text is too short for one window.
        ConfigError: A BOS token is asked for and the tokenizer has none, or a number is out of range.
    """
    _check_lengths(window_length)
    if n_windows < 0:
        raise ConfigError(f"n_windows must be at least 0 (0 takes all text), found {n_windows}")
    place = _bos_place(tokenizer, bos)
    documents = [document for source in sources for document in read_documents(source)]
    random = generator("calibration windows", seed)
    if n_windows:
        documents = [documents[i] for i in torch.randperm(len(documents), generator=random)]
        ids = _encode_enough(tokenizer, documents, n_windows * window_length)
    else:
        ids = _encode(tokenizer, _SEPARATOR.join(documents))
    windows = _cut(ids, window_length, place, tokenizer.bos_token_id)
    if not len(windows):
        raise DataError(
            f"text too short for one window: {', '.join(map(str, sources)) or 'no source'} give {len(ids)} "
            f"tokens, one window needs {window_length - (place != 'never')}. Add text or use a smaller "
            "--window-length"
        )
    if 0 < n_windows < len(windows):
        kept = torch.randperm(len(windows), generator=random)[:n_windows]
        windows = windows[kept.sort().values]
    return windows


def evaluation_windows(
    sources: Sequence[str | Path | Documents],
    tokenizer: Tokenizer,
    *,
    window_length: int,
    bos: Bos,
    max_tokens: int | None = None,
) -> list[Int[Tensor, " tokens"]]:
    """Cut text into the windows on which the literature measures perplexity (GPTQ, SparseGPT, Wanda).

    All documents in order, joined by blank lines, in windows that do not overlap; the last, partial one is
    dropped. Blank documents count here: the published numbers on WikiText-2 join them too. Text shorter than
    one window gives a single shorter window.

    Args:
        sources: What `read_documents` reads, pooled.
        tokenizer: Any of transformers.
        window_length: Tokens per window, a BOS token included.
        bos: As in `token_windows`; the literature's protocol for Llama is ``start``.
        max_tokens: Use only this many tokens from the beginning of the text.

    Raises:
        DataError: A source cannot be read, or all text is shorter than two tokens.
        ConfigError: A BOS token is asked for and the tokenizer has none, or a number is out of range.
    """
    _check_lengths(window_length, max_tokens)
    place = _bos_place(tokenizer, bos)
    documents = [document for source in sources for document in read_documents(source, keep_blank=True)]
    ids = _encode(tokenizer, _SEPARATOR.join(documents))[:max_tokens]
    length = min(window_length, len(ids) + (place != "never"))
    if length < 2:
        raise DataError(
            f"text too short to measure a perplexity: {', '.join(map(str, sources)) or 'no source'} give "
            f"{len(ids)} tokens, at least 2 are needed. Add text"
        )
    return list(_cut(ids, length, place, tokenizer.bos_token_id))


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def fingerprint(windows: Int[Tensor, "n_windows window_length"]) -> str:
    """SHA-256, in hex, of the shape and the ids as little-endian int64."""
    values = windows.cpu().numpy().astype("<i8")
    return hashlib.sha256(np.array(values.shape, dtype="<i8").tobytes() + values.tobytes()).hexdigest()


def _check_lengths(window_length: int, max_tokens: int | None = None) -> None:
    if window_length < 2:
        raise ConfigError(f"window_length must be at least 2 tokens, found {window_length}")
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens must be at least 2, found {max_tokens}")


def _bos_place(tokenizer: Tokenizer, bos: Bos) -> Literal["every", "start", "never"]:
    if bos not in get_args(Bos):
        raise ConfigError(f"unknown value of bos: {did_you_mean(bos, get_args(Bos))}")
    if bos == "auto":
        return "every" if adds_bos(tokenizer) else "never"
    if bos != "never" and tokenizer.bos_token_id is None:
        raise ConfigError(
            f"bos '{bos}' needs a beginning-of-sequence token, and this tokenizer has none: use auto or never"
        )
    return bos


def _encode(tokenizer: Tokenizer, text: str) -> Int[Tensor, " tokens"]:
    """Token ids of a text as a whole: its pieces could be cut differently where they meet."""
    # verbose=False: the text is longer than the model's limit on purpose.
    encoded = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _encode_enough(tokenizer: Tokenizer, documents: Sequence[str], n_tokens: int) -> Int[Tensor, " tokens"]:
    """Token ids of the first documents, joined: as many as give ``n_tokens``, or all of them."""
    n_characters = list(accumulate(len(document) + len(_SEPARATOR) for document in documents))
    characters_per_token = 2.0
    while True:
        wanted = math.ceil(characters_per_token * n_tokens)
        n_documents = 1 + sum(end < wanted for end in n_characters[:-1])
        ids = _encode(tokenizer, _SEPARATOR.join(documents[:n_documents]))
        if len(ids) >= n_tokens or n_documents >= len(documents):
            return ids
        # A tenth more than the rate so far, so that every turn asks for a tenth more text at least.
        characters_per_token = 1.1 * n_characters[n_documents - 1] / max(len(ids), 1)


def _cut(
    ids: Int[Tensor, " tokens"], window_length: int, place: str, bos_id: int | None
) -> Int[Tensor, "n_windows window_length"]:
    """Windows that do not overlap; the last, partial one is dropped."""
    if place == "start":
        ids = F.pad(ids, (1, 0), value=bos_id)
    n_text = window_length - (place == "every")
    windows = ids[: len(ids) // n_text * n_text].view(-1, n_text)
    return F.pad(windows, (1, 0), value=bos_id) if place == "every" else windows


# --- participants -----------------------------------------------------------------------------------------


def partition(
    windows_by_file: Sequence[Int[Tensor, "_ window_length"]],
    n_participants: int,
    *,
    method: Literal["iid", "file", "dirichlet"],
    alpha: float,
    seed: int,
) -> list[Int[Tensor, "_ window_length"]]:
    """Deal windows out: each goes to exactly one participant, and each participant gets at least one.

    ``iid`` deals all windows out at random, sizes differ by at most one. ``file`` gives file i to participant
    ``i mod n``. ``dirichlet`` draws for each file its shares ``p ~ Dir(alpha, ..., alpha)`` over the
    participants (Hsu et al. 2019, with files for classes); small alpha: each file to few participants.

    Args:
        windows_by_file: The windows of each file.
        n_participants: How many to deal out to.
        method: A key of the table above.
        alpha: Concentration of ``dirichlet``; the others do not look at it.
        seed: Seeds the draw.

    Raises:
        DataError: Fewer windows, or for ``file`` fewer files with windows, than participants.
        ConfigError: The method is unknown, or a number is out of range.
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
    indices = np.arange(n_participants)
    owners = np.concatenate(
        [
            random.permutation(
                np.repeat(indices, _largest_remainder(size, random.dirichlet(np.full(n_participants, alpha))))
            )
            for size in sizes
        ]
    )
    for participant in indices:
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
