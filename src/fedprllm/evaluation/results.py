"""Results of an evaluation. Nothing in this module needs torch."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, field_serializer

__all__ = ["Perplexity"]


class Perplexity(BaseModel):
    """Perplexity of one model on one text.

    Attributes:
        text: Name of the text.
        perplexity: ``exp(nll)``.
        nll: Mean negative log-likelihood in nats per predicted token.
        n_tokens: Number of predicted tokens.
        n_windows: Number of windows evaluated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    perplexity: float
    nll: float
    n_tokens: int
    n_windows: int

    @field_serializer("perplexity", when_used="json")
    def _finite(self, value: float) -> float | str:
        """JSON has no infinity, so a perplexity beyond the range of floats becomes the string ``inf``."""
        return value if math.isfinite(value) else str(value)

    def as_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return self.model_dump(mode="json")
