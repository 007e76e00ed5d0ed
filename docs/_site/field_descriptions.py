"""Extension of the documentation site: descriptions of the fields of configurations."""

from __future__ import annotations

import ast
from typing import Any

import griffe


def _description(annotation: ast.expr) -> str | None:
    for call in ast.walk(annotation):
        if isinstance(call, ast.Call):
            for keyword in call.keywords:
                if keyword.arg == "description":
                    return str(ast.literal_eval(keyword.value))
    return None


class FieldDescriptions(griffe.Extension):
    """Take an attribute's docstring and type from ``Annotated[type, Field(description=...)]``."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """Called with each attribute found in the source."""
        if not isinstance(node, ast.AnnAssign) or (description := _description(node.annotation)) is None:
            return
        attr.docstring = griffe.Docstring(f"{description[0].upper()}{description[1:]}.", parent=attr)
        annotation = attr.annotation
        if isinstance(annotation, griffe.ExprSubscript) and isinstance(annotation.slice, griffe.ExprTuple):
            attr.annotation = annotation.slice.elements[0]
