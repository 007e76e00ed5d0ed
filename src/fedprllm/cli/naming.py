"""Texts as they are named on the command line: ``notes/``, or ``north=notes/`` with a name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fedprllm.errors import ConfigError
from fedprllm.files import names_of

__all__ = ["named_texts"]

_NAMED = re.compile(r"([^=/\\:]+)=(.+)")


def named_texts(items: Sequence[str], option: str) -> list[str] | dict[str, list[str]]:
    """What an option that names texts was given.

    A name that is given several times collects several paths. A path that exists is a path, also if it holds
    an equals sign.

    Args:
        items: The option's values.
        option: Name of the option, for errors.

    Returns:
        The paths as they are if none has a name; otherwise lists of paths by name, where a path without a
        name is called after its file.

    Raises:
        ConfigError: A name cannot name a folder.
    """
    parts = [_parted(item, option) for item in items]
    if all(name is None for name, _ in parts):
        return list(items)
    unnamed = names_of([path for name, path in parts if name is None])
    found: dict[str, list[str]] = {}
    for name, path in parts:
        found.setdefault(unnamed.pop(0) if name is None else name, []).append(path)
    return found


def _parted(item: str, option: str) -> tuple[str | None, str]:
    match = _NAMED.fullmatch(item)
    if match is None or Path(item).expanduser().exists():
        return None, item
    name = match[1].strip()
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(
            f"--{option} {item}: '{name}' cannot be a name: use letters, digits, dots, dashes and "
            "underscores, beginning with a letter or digit"
        )
    return name, match[2]
