"""Every error a user can cause, as one small tree.

FedprllmError
├── ConfigError    an option has a value it cannot have, or two options contradict each other
├── DataError      a text file or a token window cannot be used
├── ModelError     a model cannot be read, walked or pruned
├── RunError       a run folder cannot be used, or the disk is full
│   └── RunBusy    another process works on the run folder
└── UpdateError    an update of a participant is not what the run asked for

Each message names the thing, what was expected, what was found and what to do. The command line
prints the message and exits with status 2; anything outside this tree is a defect of ours and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "FedprllmError",
    "ModelError",
    "RunBusy",
    "RunError",
    "UpdateError",
    "did_you_mean",
]


class FedprllmError(Exception):
    """Base of every error that a user can cause and repair."""


class ConfigError(FedprllmError, ValueError):
    """An option has a value it cannot have, or two options contradict each other."""


class DataError(FedprllmError, ValueError):
    """A text file or a token window cannot be used."""


class ModelError(FedprllmError):
    """A model cannot be read, walked or pruned."""


class RunError(FedprllmError):
    """A run folder cannot be used, or the disk under it is full."""


class RunBusy(RunError):  # noqa: N818  a state, which passes
    """Another process works on the run folder."""


class UpdateError(FedprllmError, ValueError):
    """An update of a participant is not what the run asked for."""


def did_you_mean(found: object, available: Iterable[object]) -> str:
    """Return ``"'x'; did you mean 'y'? Available: y, z."`` for an unknown name.

    Args:
        found: What the user wrote.
        available: Every name that would have been accepted, in the order to show them.
    """
    names = [str(name) for name in available]
    close = difflib.get_close_matches(str(found).lower(), names, n=1, cutoff=0.5)
    guess = f"; did you mean '{close[0]}'?" if close else "."
    return f"'{found}'{guess} Available: {', '.join(names)}."
