"""The checks that jaxtyping applies to the annotations of `fedprllm.core` while testing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype as check  # noqa: F401  the hook looks it up by name

_jaxtyped = jaxtyping.jaxtyped


def names_a_shape(function: Any) -> bool:
    """Whether an annotation of `function`, as text, contains a shape: `Float[Tensor, "rows inputs"]`."""
    annotations = getattr(function, "__annotations__", {})
    return any(set("'\"") & set(str(annotation)) for annotation in annotations.values())


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """Do as `jaxtyping.jaxtyped`, but only where a shape is named or a class may name some.

    A check costs more than most of what is checked, and making one for a function inside a function, at every
    call of the outer one, took a third of a test.
    """
    decorate = _jaxtyped(typechecker=typechecker)

    def sparingly(definition: Any) -> Any:
        return (
            decorate(definition) if isinstance(definition, type) or names_a_shape(definition) else definition
        )

    return sparingly


def install() -> None:
    """Check the shapes of every module of `fedprllm.core` that is imported from now on."""
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
    jaxtyping.install_import_hook("fedprllm.core", "tests.shape_checks.check")
