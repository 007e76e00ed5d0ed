"""Commands whose options are made from the fields of a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Annotated, Any

__all__ = ["with_options"]


def with_options(
    command: Callable[..., None],
    options: Mapping[str, tuple[Any, Any]],
    required: Collection[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[..., None]:
    """Give a function of keyword arguments a signature that typer can read, and return it.

    Args:
        command: The function.
        options: Type and option of each argument by name, in the order of the help.
        required: Arguments that must be given.
        defaults: Values of arguments that are not given; None where there is none.
    """
    annotated = {name: Annotated[annotation, option] for name, (annotation, option) in options.items()}
    # Keyword-only parameters may have defaults in any order.
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if name in required else defaults.get(name),
                annotation=annotation,
            )
            for name, annotation in annotated.items()
        ]
    )
    command.__annotations__ = annotated
    return command
