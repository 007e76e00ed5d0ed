"""All errors that a user can cause, in one small tree.

FedprllmError
├── ConfigError    an option has an invalid value, or options contradict each other
├── DataError      a text file or a token window cannot be used
├── ModelError     a model cannot be read, processed block by block, or pruned
├── RunError       a run folder cannot be used
│   ├── RunBusy    another process is using the run folder
│   └── DiskFull   the disk is full
├── SecureError    a step of secure aggregation was refused, because it could reveal an update
└── UpdateError    a participant's update does not match what the run asked for

Each message says what is wrong, what was expected, what was found and what to do. The command line prints
the message and exits with status 2. Any exception outside this tree is a bug and keeps its traceback.

What a user should know although the work goes on is a `FedprllmWarning`, which the command line prints as a
note.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "DiskFull",
    "FedprllmError",
    "FedprllmWarning",
    "ModelError",
    "RunBusy",
    "RunError",
    "SecureError",
    "UpdateError",
    "did_you_mean",
]


class FedprllmError(Exception):
    """Base class of all errors that a user can cause and fix."""


class FedprllmWarning(UserWarning):
    """Something that a user should know although the work goes on."""


class ConfigError(FedprllmError, ValueError):
    """An option has an invalid value, or options contradict each other."""


class DataError(FedprllmError, ValueError):
    """A text file or a token window cannot be used."""


class ModelError(FedprllmError):
    """A model cannot be read, processed block by block, or pruned."""


class RunError(FedprllmError):
    """A run folder cannot be used."""


class RunBusy(RunError):  # noqa: N818  a temporary state
    """Another process is using the run folder."""


class DiskFull(RunError):  # noqa: N818  a temporary state
    """The disk is full. What was written before is kept."""


class SecureError(FedprllmError):
    """A step of secure aggregation was refused, because it could reveal a participant's update."""


class UpdateError(FedprllmError, ValueError):
    """A participant's update does not match what the run asked for."""


def did_you_mean(found: object, available: Iterable[object]) -> str:
    """Return ``"'x'; did you mean 'y'? Available: y, z."`` for an unknown name.

    Args:
        found: The name that the user wrote.
        available: All accepted names, in the order in which to show them.
    """
    names = [str(name) for name in available]
    close = difflib.get_close_matches(str(found).lower(), names, n=1, cutoff=0.5)
    guess = f"; did you mean '{close[0]}'?" if close else "."
    return f"'{found}'{guess} Available: {', '.join(names)}."
