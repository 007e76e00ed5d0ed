"""Options and TOML files written by users: immutable, with one clear line for each mistake.

Nothing here imports torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from fedprllm.errors import ConfigError, did_you_mean

__all__ = ["Settings", "choices_of", "read_toml"]


class Settings(BaseModel):
    """Base class of user-written options, validated on creation.

    Attributes:
        subject: Prefix of error messages that says where the options come from; empty by default.

    Raises:
        ConfigError: A value is unknown, missing, of the wrong type, out of range, or contradicts another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    subject: ClassVar[str] = ""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("\n".join(self._explain(defect) for defect in error.errors())) from None

    @classmethod
    def _explain(cls, defect: Mapping[str, Any]) -> str:
        """Describe one mistake in the user's terms instead of pydantic's."""
        known = cls.model_fields
        name = ".".join(str(part) for part in defect["loc"]) or "configuration"
        cause = defect.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            return str(cause)
        if defect["type"] == "extra_forbidden":
            return f"{cls.subject}unknown option {did_you_mean(name, known)}"
        if defect["type"] == "missing":
            return f"{cls.subject}{name} is missing"
        if defect["type"] == "literal_error" and name in known:
            choices = choices_of(known[name].annotation)
            return f"{cls.subject}unknown value of {name}: {did_you_mean(defect['input'], choices)}"
        message = defect["msg"][0].lower() + defect["msg"][1:]
        return f"{cls.subject}{name}: {message}, found {defect['input']!r}"


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The values that an option accepts if it is an enumeration; otherwise empty."""
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Literal:
            return get_args(part)
    return ()


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; dashes in top-level option names are treated as underscores.

    Raises:
        ConfigError: The file cannot be read or is not valid TOML.
    """
    try:
        # Some editors put a byte-order mark at the start of the file.
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return {name.replace("-", "_"): value for name, value in values.items()}
