"""Hidden states between two blocks: in memory up to a limit, in files beyond it.

A window of 2048 tokens takes 32 MB at LLaMA-7B's width in float32. A hundred windows take as much memory as
the rest of a walk together, yet they are needed only one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from fedprllm.files import save_tensors

__all__ = ["HiddenMemory", "HiddenStates"]

Hidden = Float[Tensor, "1 tokens hidden"]
_NAME = "hidden"


class HiddenMemory:
    """A memory budget shared by the hidden states of several participants.

    Args:
        folder: Folder for the states that exceed the limit; its previous content is deleted.
        limit_bytes: Limit for all states in memory together, in bytes; None for no limit.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        assert limit_bytes is None or folder is not None, "a limit needs a folder for the states beyond it"
        self.folder = folder
        self._limit = limit_bytes
        self._used = 0
        self.clear()

    def take(self, n_bytes: int) -> bool:
        """Reserve memory if enough is left; returns whether it was."""
        fits = self._limit is None or self._used + n_bytes <= self._limit
        self._used += n_bytes * fits
        return fits

    def give_back(self, n_bytes: int) -> None:
        """Release reserved memory."""
        self._used -= n_bytes

    def clear(self) -> None:
        """Delete all files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class HiddenStates:
    """One participant's hidden states by window, each of which stays in memory or in its file.

    Args:
        memory: Memory budget, possibly shared with other participants; unlimited by default.
        name: Name of the participant, used in file names.
    """

    def __init__(self, memory: HiddenMemory | None = None, name: str = "") -> None:
        self._memory = memory or HiddenMemory()
        self._name = name
        self._device = torch.device("cpu")
        self._states: list[Hidden | Path] = []

    def fill(self, states: Iterable[Hidden]) -> None:
        """Replace all states by new ones, taken one at a time."""
        self.clear()
        for number, state in enumerate(states):
            if self._memory.take(state.nbytes):
                self._states.append(state)
            else:
                assert self._memory.folder is not None
                self._states.append(self._memory.folder / f"{self._name}.{number}.safetensors")
                self[number] = state

    def clear(self) -> None:
        """Drop all states."""
        for state in self._states:
            if isinstance(state, Path):
                state.unlink(missing_ok=True)
            else:
                self._memory.give_back(state.nbytes)
        self._states = []

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[Hidden]:
        for state in self._states:
            # Copied into fresh memory: on a mapped file, matrix products may differ in the last bit.
            yield _mapped(state).clone().to(self._device) if isinstance(state, Path) else state

    def __setitem__(self, number: int, state: Hidden) -> None:
        """Replace a window's state by another of the same size."""
        place = self._states[number]
        if isinstance(place, Path):
            self._device = state.device
            # Lost with the process anyway.
            save_tensors(place, {_NAME: state.cpu()}, durable=False)
        else:
            self._states[number] = state

    def kept(self) -> list[Hidden]:
        """All states for writing; those in files are views of the files."""
        return [_mapped(state) if isinstance(state, Path) else state for state in self._states]


def _mapped(path: Path) -> Hidden:
    with safe_open(path, framework="pt") as opened:
        state: Tensor = opened.get_tensor(_NAME)
    return state
