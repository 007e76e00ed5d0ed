"""The configuration of a run: every option once, with its meaning, its default and its check.

The command line, the TOML file and the Python interface all read this class, so an option is added
here and nowhere else. Nothing in this module imports torch: ``fedprllm --help`` must answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, model_validator

from fedprllm.errors import ConfigError, did_you_mean
from fedprllm.settings import Settings

__all__ = ["CriterionName", "PruneConfig", "ShareName"]

Group = Literal["layer", "row", "column"]
# The names of the rows of `fedprllm.core.criteria.CRITERIA`.
CriterionName = Literal[
    "wanda",
    "ria",
    "magnitude",
]
# The names of the rows of `fedprllm.deciding.DECISIONS`: what a participant may share to prune.
ShareName = Literal[
    "mask",
    "statistics",
    "gram",
    "weights",
]
_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


def _spell_fractions(value: Any) -> Any:
    """Numbers and mappings of `block_fraction` in its one spelling."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={fraction}" for name, fraction in value.items())
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class PruneConfig(Settings):
    """How to prune; immutable, checked when it is made.

    The defaults are what the paper found best: local Wanda masks compared by row, one-shot, the server
    compares by layer, no weight scaling.

    Raises:
        ConfigError: A value is unknown, out of range or contradicts another one.
    """

    sparsity: Annotated[
        float, Field(description="fraction of the prunable weights set to zero, in [0, 1)")
    ] = 0.5
    pattern: Annotated[
        str, Field(description="unstructured, or N:M (at most N non-zeros in M consecutive inputs)")
    ] = "unstructured"
    criterion: Annotated[CriterionName, Field(description="score by which weights are ranked")] = "wanda"
    local_group: Annotated[
        Literal["row", "layer", "column"],
        Field(description="weights a participant ranks against each other"),
    ] = "row"
    server_group: Annotated[
        Literal["layer", "row", "column"],
        Field(description="weights whose votes the server ranks against each other"),
    ] = "layer"
    strategy: Annotated[
        Literal["one-shot", "iterative", "centralized", "local-only"],
        Field(description="whose decision prunes a block, and when it is made"),
    ] = "one-shot"
    share: Annotated[
        ShareName,
        Field(
            description="what a participant shares; gram is pruned with SparseGPT, weights as in FedSpaLLM"
        ),
    ] = "mask"
    max_update_mb: Annotated[
        float | None, Field(gt=0, description="refuse to share more than this per block, in MB")
    ] = None
    allocation: Annotated[
        Literal["uniform", "owl"],
        Field(description="sparsity of the blocks: the same for all, or lower where outliers are more (OWL)"),
    ] = "uniform"
    owl_m: Annotated[
        float,
        Field(gt=0, description="OWL: a score counts as an outlier above this multiple of its block's mean"),
    ] = 5.0
    owl_lambda: Annotated[
        float, Field(ge=0, lt=1, description="OWL: how far a block's sparsity may deviate from the model's")
    ] = 0.08
    block_fraction: Annotated[
        str,
        BeforeValidator(_spell_fractions),
        Field(description="share of the blocks that a participant prunes: F for all, or NAME=F,NAME=F"),
    ] = "1"
    weighting: Annotated[
        Literal["participants", "tokens"],
        Field(description="how much a vote counts: 1, or the participant's number of calibration tokens"),
    ] = "participants"
    scale_weights: Annotated[bool, Field(description="multiply the kept weights by (m - votes) / m")] = False
    ties: Annotated[
        Literal["index", "random", "magnitude"],
        Field(
            description="which of equal scores is pruned first: lowest index, seeded draw, smallest weight"
        ),
    ] = "index"
    server_ties: Annotated[
        Literal["index", "random", "magnitude"] | None,
        Field(description="the rule for equal votes, where it differs from --ties"),
    ] = None
    windows: Annotated[
        int, Field(ge=0, description="calibration windows per participant; 0 takes all of its text")
    ] = 16
    window_length: Annotated[
        int | None,
        Field(ge=2, description="tokens per window [default: 2048, or the model's limit if lower]"),
    ] = None
    bos: Annotated[
        Literal["auto", "every", "start", "never"],
        Field(description="beginning-of-sequence token: auto = every window if the tokenizer adds one"),
    ] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        Field(description="precision of the forward passes; the weights keep the precision of their file"),
    ] = "float32"
    device: Annotated[str, Field(description="where to compute: cpu, cuda, cuda:1, mps")] = "cpu"
    memory_limit: Annotated[
        ByteSize | None,
        # Left out of what identifies a run: it changes no bit.
        Field(
            gt=0, exclude=True, description="memory for hidden states, such as 2GiB; the rest goes to files"
        ),
    ] = None
    seed: Annotated[int, Field(ge=0, description="seed for the choice of windows and for random ties")] = 0

    @model_validator(mode="before")
    @classmethod
    def _imply_sparsity(cls, values: Any) -> Any:
        """An N:M pattern fixes the sparsity, the one option that another one determines."""
        match = _PATTERN.fullmatch(str(values.get("pattern", ""))) if isinstance(values, Mapping) else None
        if match is None or "sparsity" in values or int(match[1]) >= int(match[2]):
            return values
        return {**values, "sparsity": float(_implied_sparsity(match))}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 <= self.sparsity < 1:
            raise ConfigError(
                f"sparsity must lie in [0, 1), found {self.sparsity:g}: it is the fraction of weights set "
                "to zero, for example 0.5"
            )
        if self.pattern != "unstructured":
            self._check_pattern()
        self._check_sharing()
        self._check_blocks()
        return self

    def _check_blocks(self) -> None:
        if self.allocation == "owl" and self.n_m is not None:
            raise ConfigError(
                f"pattern {self.pattern} fixes the sparsity of every block: allocation owl needs pattern "
                "unstructured"
            )
        fractions = self._fractions()
        for name, fraction in fractions.items():
            if not 0 < fraction <= 1:
                raise ConfigError(
                    f"block_fraction must lie in (0, 1], found {float(fraction):g}"
                    + (f" of participant '{name}'" if name else "")
                )
        if set(fractions.values()) != {1} and self.strategy in ("centralized", "local-only"):
            raise ConfigError(
                f"block_fraction shares the blocks out among participants: strategy {self.strategy} has "
                "no participant to prune the others"
            )

    def _fractions(self) -> dict[str, Fraction]:
        """Fractions by participant; the default under the empty name."""
        fractions: dict[str, Fraction] = {}
        for part in self.block_fraction.split(","):
            name, _, fraction = part.rpartition("=")
            try:
                fractions[name.strip()] = Fraction(fraction.strip())
            except (ValueError, ZeroDivisionError):
                raise ConfigError(
                    f"block_fraction must be a number or NAME=F,NAME=F, found '{self.block_fraction}'"
                ) from None
        return fractions

    def block_fractions(self, names: Sequence[str]) -> dict[str, Fraction]:
        """The share of the blocks that each participant prunes; participants not listed prune every block.

        Raises:
            ConfigError: A name is listed that is not among the participants.
        """
        fractions = self._fractions()
        default = fractions.pop("", Fraction(1))
        for name in fractions:
            if name not in names:
                raise ConfigError(f"block_fraction: unknown participant {did_you_mean(name, names)}")
        return {name: fractions.get(name, default) for name in names}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind of update that a participant of such a run sends."""
        sums = self.share in ("statistics", "gram")
        survey = () if self.allocation == "uniform" else ("statistics" if sums else "outliers",)
        return tuple(dict.fromkeys((*survey, self.share)))

    def _check_sharing(self) -> None:
        if self.share != "mask":
            for option, value in (("scale_weights", False), ("weighting", "participants")):
                if getattr(self, option) != value:
                    raise ConfigError(
                        f"{option} concerns votes: it needs share mask, found share {self.share}"
                    )
        if self.server_ties is not None and self.share not in ("mask", "weights"):
            raise ConfigError(f"server_ties concerns votes: share {self.share} has none; leave it out")
        if self.share in ("statistics", "gram") and self.criterion == "magnitude":
            raise ConfigError(f"criterion magnitude uses no text: nothing to share as {self.share}")

    def _check_pattern(self) -> None:
        match = _PATTERN.fullmatch(self.pattern)
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigError(
                f"pattern must be 'unstructured' or 'N:M' with 0 < N < M (2:4 keeps at most two non-zeros "
                f"of four consecutive inputs), found '{self.pattern}'"
            )
        implied = _implied_sparsity(match)
        if Fraction(str(self.sparsity)) not in (implied, Fraction(str(float(implied)))):
            raise ConfigError(
                f"pattern {self.pattern} means sparsity {float(implied):g}, found sparsity "
                f"{self.sparsity:g}: leave sparsity out"
            )

    @property
    def vote_ties(self) -> str:
        """The tie rule among equal votes."""
        return self.server_ties or self.ties

    @property
    def n_m(self) -> tuple[int, int] | None:
        """``(N, M)`` of an N:M pattern, or None for an unstructured one."""
        match = _PATTERN.fullmatch(self.pattern)
        return (int(match[1]), int(match[2])) if match else None


def _implied_sparsity(match: re.Match[str]) -> Fraction:
    return 1 - Fraction(int(match[1]), int(match[2]))
