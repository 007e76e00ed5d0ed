"""The checker that jaxtyping applies to the annotations of `fedprllm.core` while testing."""

from __future__ import annotations

from typing import Any

from beartype import beartype


def check(function: Any) -> Any:
    """Check annotations; leave out functions inside functions unless they name a shape.

    They are made anew at every call, and making the checks costs more than what they do.
    """
    annotations = getattr(function, "__annotations__", {})
    names_a_shape = any(set("'\"") & set(str(annotation)) for annotation in annotations.values())
    nested = "<locals>" in getattr(function, "__qualname__", "")
    return function if nested and not names_a_shape else beartype(function)
