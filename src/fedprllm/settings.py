"""What a person writes: options and TOML files, immutable, every mistake named in one line.

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
    """Options that a person writes, checked when they are made.

    Attributes:
        subject: What the options are of, put before messages; nothing by default.

    Raises:
        ConfigError: A value is unknown, missing, of the wrong type, out of range or contradicts another one.
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
        """One defect in the user's words instead of pydantic's."""
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
    """The words that an option takes; none if it takes anything else."""
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Literal:
            return get_args(part)
    return ()


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; dashes in the names of top-level options count as underscores.

    Raises:
        ConfigError: The file cannot be read or is not TOML.
    """
    try:
        # Some editors put a byte-order mark before the first option.
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return {name.replace("-", "_"): value for name, value in values.items()}
