"""The configuration of a run: every option in one place, with its meaning, default and validation.

The command line, TOML files and the Python API all read this class, so adding an option here is enough. This
module must not import torch, directly or indirectly, so that ``fedprllm --help`` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, model_validator

from fedprllm.errors import ConfigError, did_you_mean
from fedprllm.settings import Settings

__all__ = [
    "Bos",
    "CriterionName",
    "Device",
    "Dtype",
    "LinearName",
    "PruneConfig",
    "ShareName",
    "WindowLength",
]

Group = Literal["layer", "row", "column"]
# Keys of `fedprllm.core.criteria.CRITERIA`.
CriterionName = Literal[
    "wanda",
    "ria",
    "magnitude",
]
# Keys of `fedprllm.deciding.DECISIONS`: what a participant can share for pruning.
ShareName = Literal[
    "mask",
    "statistics",
    "gram",
    "weights",
    "channels",
    "heads",
    "parts",
    "influence",
    "experts",
]
# With share gram, names of rows of `fedprllm.deciding.DECISIONS`.
SolverName = Literal[
    "admm",
    "sparsegpt",
    "alps",
]
# Options of reading text and computing, which healing has as well.
WindowLength = Annotated[
    int | None,
    Field(ge=2, description="tokens per window [default: 2048, or the model's limit if lower]"),
]
Bos = Annotated[
    Literal["auto", "every", "start", "never"],
    Field(
        description="where to put a beginning-of-sequence token (auto: in every window if the tokenizer adds "
        "one)"
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    Field(description="precision of the forward passes; weights keep the precision of the checkpoint"),
]
Device = Annotated[str, Field(description="where to compute: cpu, cuda, cuda:1, mps")]
LinearName = Annotated[str, Field(min_length=1, max_length=200)]
# What a structure removes, and what participants share for it.
_STRUCTURES = {
    ("mlp",): "channels",
    ("heads",): "heads",
    ("heads", "mlp"): "parts",
    ("depth",): "influence",
    ("experts",): "experts",
}
_PARTS = {
    "mlp": "MLPs with {} fewer channels",
    "heads": "attention with {} fewer query heads",
    "depth": "{} fewer blocks",
    "experts": "{} fewer experts in each block",
}
_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


def _spell_fractions(value: Any) -> Any:
    """Turn a number or a mapping given for `block_fraction` into its canonical text."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={fraction}" for name, fraction in value.items())
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class PruneConfig(Settings):
    """How to prune; immutable, validated on creation.

    The defaults are the settings that the paper found best: local Wanda masks compared by row, one-shot
    voting compared by layer at the server, and no weight scaling.

    Raises:
        ConfigError: A value is unknown, out of range, or contradicts another one.
    """

    sparsity: Annotated[
        float, Field(description="fraction of the prunable weights to set to zero, in [0, 1)")
    ] = 0.5
    pattern: Annotated[
        str, Field(description="unstructured, or N:M like 2:4 (at most N nonzeros in M consecutive inputs)")
    ] = "unstructured"
    exclude: Annotated[
        tuple[LinearName, ...],
        Field(
            max_length=100,
            description="Linears that stay dense: a name, or a pattern such as *.o_proj or model.layers.3.* "
            "(repeat for several)",
        ),
    ] = ()
    criterion: Annotated[
        CriterionName,
        Field(description="score that ranks weights (lowest pruned first; magnitude needs no text)"),
    ] = "wanda"
    local_group: Annotated[
        Literal["row", "layer", "column"],
        Field(description="part of a weight matrix within which a participant compares scores"),
    ] = "row"
    server_group: Annotated[
        Literal["layer", "row", "column"],
        Field(description="part of a weight matrix within which the server compares votes"),
    ] = "layer"
    strategy: Annotated[
        Literal["one-shot", "iterative", "centralized", "local-only"],
        Field(
            description="how participants are combined (one vote at the end, one per block, pooled text, or "
            "not at all)"
        ),
    ] = "one-shot"
    share: Annotated[
        ShareName,
        Field(description="what a participant shares (gram prunes with a solver, weights with FedSpaLLM)"),
    ] = "mask"
    solver: Annotated[
        SolverName | None,
        Field(
            description="with share gram: how the remaining weights are corrected [default: admm] (alps is "
            "slower and a little better)"
        ),
    ] = None
    structure: Annotated[
        str | None,
        BeforeValidator(_spell_fractions),
        Field(
            description="remove whole parts, so that a smaller dense model remains: mlp=F removes the "
            "fraction F of the channels of every MLP, heads=N N query heads of every block; mlp=F,heads=N "
            "both; depth=N drops N blocks; experts=N removes N experts of every block"
        ),
    ] = None
    smaller: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="remove at least this fraction of the parameters of the blocks: the structure is "
            "chosen whose model has the lowest loss on held-out windows of all participants",
        ),
    ] = None
    max_update_mb: Annotated[
        float | None, Field(gt=0, description="refuse the run if a participant would share more MB per block")
    ] = None
    allocation: Annotated[
        Literal["uniform", "owl"],
        Field(description="sparsity of the blocks (the same for all, or lower in blocks with more outliers)"),
    ] = "uniform"
    owl_m: Annotated[
        float,
        Field(gt=0, description="OWL: a score above this multiple of its block's mean is an outlier"),
    ] = 5.0
    owl_lambda: Annotated[
        float,
        Field(ge=0, lt=1, description="OWL: largest difference between a block's sparsity and the model's"),
    ] = 0.08
    block_fraction: Annotated[
        str,
        BeforeValidator(_spell_fractions),
        Field(
            description="fraction of the blocks that a participant prunes: F for all participants, or "
            "NAME=F,NAME=F"
        ),
    ] = "1"
    weighting: Annotated[
        Literal["participants", "tokens"],
        Field(description="weight of a vote (1, or the participant's number of calibration tokens)"),
    ] = "participants"
    aggregation: Annotated[
        Literal["sum", "trimmed"],
        Field(
            description="how statistics are combined (trimmed: leave out the highest and lowest quarter of "
            "the participants in each channel)"
        ),
    ] = "sum"
    scale_weights: Annotated[
        bool, Field(description="multiply each kept weight by the fraction of votes to keep it")
    ] = False
    ties: Annotated[
        Literal["index", "random", "magnitude"],
        Field(description="which of several equal scores is pruned first (magnitude: smallest weight)"),
    ] = "index"
    server_ties: Annotated[
        Literal["index", "random", "magnitude"] | None,
        Field(description="which of several equal vote counts is pruned first, if not as --ties"),
    ] = None
    windows: Annotated[
        int, Field(ge=0, description="calibration windows per participant; 0 uses all of its text")
    ] = 16
    window_length: WindowLength = None
    bos: Bos = "auto"
    dtype: Dtype = "float32"
    device: Device = "cpu"
    memory_limit: Annotated[
        ByteSize | None,
        # Excluded from the identity of a run because it does not change the result.
        Field(
            gt=0,
            exclude=True,
            description="most memory for hidden states, such as 2GiB; the rest is kept in files",
        ),
    ] = None
    secure: Annotated[
        bool,
        Field(description="add updates up under masks, so that only sums over participants are seen"),
    ] = False
    seed: Annotated[int, Field(ge=0, description="seed for choosing windows and for random ties")] = 0

    @model_validator(mode="before")
    @classmethod
    def _imply_sparsity(cls, values: Any) -> Any:
        """Derive the sparsity from an N:M pattern if it is not given."""
        match = _PATTERN.fullmatch(str(values.get("pattern", ""))) if isinstance(values, Mapping) else None
        if match is None or "sparsity" in values or int(match[1]) >= int(match[2]):
            return values
        return {**values, "sparsity": float(_implied_sparsity(match))}

    @model_validator(mode="before")
    @classmethod
    def _imply_sharing(cls, values: Any) -> Any:
        """With a structure, derive what is shared, and prune no single weights, unless something is given."""
        if not isinstance(values, Mapping):
            return values
        if values.get("smaller") is not None and "pattern" not in values:
            values = {"sparsity": 0.0, **values}
        if values.get("structure") is None:
            return values
        parts = str(_spell_fractions(values["structure"])).split(",")
        names = tuple(sorted(part.partition("=")[0].strip() for part in parts))
        implied: dict[str, Any] = {"share": _STRUCTURES.get(names, "parts")}
        if "pattern" not in values:
            implied["sparsity"] = 0.0
        return {**implied, **values}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 <= self.sparsity < 1:
            raise ConfigError(
                f"sparsity must lie in [0, 1), found {self.sparsity:g}: give the fraction of weights to set "
                "to zero, for example 0.5"
            )
        self._check_structure()
        self._check_smaller()
        if self.pattern != "unstructured":
            self._check_pattern()
        self._check_sharing()
        self._check_blocks()
        self._check_secure()
        return self

    def _check_structure(self) -> None:
        if self.structure is None:
            if self.share in _STRUCTURES.values():
                raise ConfigError(
                    f"share {self.share} needs a structure to remove: give structure mlp=0.2, for instance"
                )
            return
        for name, amount in self.structures.items():
            is_number = name != "mlp" and amount >= 1 and amount.denominator == 1
            if not (0 <= amount < 1 or is_number):
                also = " or a whole number" if name != "mlp" else ""
                raise ConfigError(
                    f"structure {name} must remove a fraction in [0, 1){also}, found {float(amount):g}"
                )
        expected = _STRUCTURES.get(tuple(sorted(self.structures)))
        if expected is None:
            raise ConfigError(
                f"structure {self.structure}: blocks and experts cannot be removed together with another "
                "part: remove them in one run, and make the result narrower in a second"
            )
        self._check_removed_at_the_end()
        if self.share != expected:
            raise ConfigError(
                f"structure {self.structure} is decided from {expected}, found share {self.share}: leave "
                "share out"
            )
        single = {"pattern": "unstructured", "sparsity": 0.0, "allocation": "uniform", "exclude": ()}
        for option, value in single.items():
            if getattr(self, option) != value:
                raise ConfigError(
                    f"{option} applies to single weights, which a structure does not prune: leave it out, "
                    "and prune the smaller model in a second run"
                )

    def _check_smaller(self) -> None:
        if self.smaller is None:
            return
        if self.structure is not None:
            raise ConfigError(
                f"smaller chooses a structure, found structure {self.structure} beside it: give one of them"
            )
        if "share" in self.model_fields_set:
            raise ConfigError(
                f"smaller chooses what is removed, and with it what is shared, found share {self.share}: "
                "leave share out"
            )
        if self.strategy == "local-only":
            raise ConfigError(
                "smaller chooses by the loss on the text of all participants, found strategy local-only: run "
                "every participant by itself, or use one-shot or iterative"
            )
        self.with_structure("depth=1")

    def with_structure(self, structure: str) -> PruneConfig:
        """The same options, with a structure in place of ``smaller``.

        Raises:
            ConfigError: An option contradicts this structure.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set if name != "smaller"}
        return PruneConfig(**{**given, "structure": structure})

    def _check_removed_at_the_end(self) -> None:
        """Refuse strategies that need each block as the pruned model has it while the walk goes on."""
        name = next((name for name in ("depth", "experts") if name in self.structures), None)
        if name is not None and self.strategy == "local-only":
            raise ConfigError(
                f"structure {name} needs one model of all participants, found strategy local-only: run "
                "every participant by itself, or use one-shot"
            )
        if name == "experts" and self.strategy == "iterative":
            raise ConfigError(
                "structure experts is decided from the dense model, found strategy iterative: use one-shot"
            )

    @property
    def structures(self) -> dict[str, Fraction]:
        """What is removed of each part: below 1 a fraction, otherwise a number. Empty if nothing is.

        Raises:
            ConfigError: The text is not understood.
        """
        if self.structure is None:
            return {}
        found: dict[str, Fraction] = {}
        for entry in self.structure.split(","):
            name, _, amount = (piece.strip() for piece in entry.partition("="))
            if name not in _PARTS:
                raise ConfigError(f"structure: unknown part {did_you_mean(name, tuple(_PARTS))}")
            try:
                value = Fraction(amount)
            except (ValueError, ZeroDivisionError):
                value = None
            if value is None or name in found:
                raise ConfigError(
                    f"structure must be mlp=F, heads=N, both, depth=N or experts=N, found '{self.structure}'"
                )
            found[name] = value
        return found

    def _check_blocks(self) -> None:
        if self.allocation == "owl" and self.n_m is not None:
            raise ConfigError(
                f"pattern {self.pattern} fixes the sparsity of every block, which allocation owl would vary: "
                "use pattern unstructured or allocation uniform"
            )
        fractions = self._fractions()
        for name, fraction in fractions.items():
            if not 0 < fraction <= 1:
                raise ConfigError(
                    f"block_fraction must lie in (0, 1], found {float(fraction):g}"
                    + (f" for participant '{name}'" if name else "")
                )
        if set(fractions.values()) != {1} and self.strategy in ("centralized", "local-only"):
            raise ConfigError(
                f"block_fraction divides the blocks among participants, but strategy {self.strategy} has no "
                "other participant to prune the rest: leave it out"
            )

    def _fractions(self) -> dict[str, Fraction]:
        """Fractions by participant name; the default is stored under the empty name."""
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
        """Fraction of the blocks that each participant prunes; participants not listed prune every block.

        Args:
            names: Names of the participants of the run.

        Raises:
            ConfigError: A listed name is not a participant.
        """
        fractions = self._fractions()
        default = fractions.pop("", Fraction(1))
        for name in fractions:
            if name not in names:
                raise ConfigError(f"block_fraction: unknown participant {did_you_mean(name, names)}")
        return {name: fractions.get(name, default) for name in names}

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of update that a participant sends during the run."""
        sums = self.share in ("statistics", "gram")
        survey = () if self.allocation == "uniform" else ("statistics" if sums else "outliers",)
        return tuple(dict.fromkeys((*survey, self.share)))

    def _check_sharing(self) -> None:
        if self.share != "mask":
            for option, value in (("scale_weights", False), ("weighting", "participants")):
                if getattr(self, option) != value:
                    raise ConfigError(
                        f"{option} applies to votes, which need share mask, found share {self.share}: "
                        "leave it out"
                    )
        if self.solver is not None and self.share != "gram":
            raise ConfigError(
                f"solver applies to Gram matrices, which need share gram, found share {self.share}: leave "
                "it out"
            )
        if self.aggregation != "sum" and self.share != "statistics":
            raise ConfigError(
                f"aggregation {self.aggregation} applies to sums of squares, which need share statistics, "
                f"found share {self.share}: leave it out"
            )
        if self.server_ties is not None and self.share not in ("mask", "weights"):
            raise ConfigError(f"server_ties applies to votes, but share {self.share} has none: leave it out")
        if self.share in ("statistics", "gram", *_STRUCTURES.values()) and self.criterion == "magnitude":
            raise ConfigError(
                f"criterion magnitude uses no text, so there are no sums to share as {self.share}: use share "
                "mask or another criterion"
            )

    def _check_secure(self) -> None:
        if not self.secure:
            return
        if self.strategy not in ("one-shot", "iterative"):
            raise ConfigError(
                f"secure adds up what participants share, and with strategy {self.strategy} nothing is "
                "shared: use one-shot or iterative, or leave it out"
            )
        if self.aggregation != "sum":
            raise ConfigError(
                f"aggregation {self.aggregation} needs each participant's update, and secure shows only "
                "their sum: use aggregation sum, or leave secure out"
            )
        if self.weighting == "tokens" and not self.windows:
            raise ConfigError(
                "secure needs a limit on the votes of one participant: with weighting tokens, set windows to "
                "the most windows that a participant has"
            )

    def _check_pattern(self) -> None:
        match = _PATTERN.fullmatch(self.pattern)
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigError(
                f"pattern must be 'unstructured' or 'N:M' with 0 < N < M (2:4 keeps at most two nonzeros in "
                f"four consecutive inputs), found '{self.pattern}'"
            )
        implied = _implied_sparsity(match)
        if Fraction(str(self.sparsity)) not in (implied, Fraction(str(float(implied)))):
            raise ConfigError(
                f"pattern {self.pattern} implies sparsity {float(implied):g}, found sparsity "
                f"{self.sparsity:g}: leave sparsity out"
            )

    @property
    def goal(self) -> str:
        """What the run prunes to, in words."""
        if self.smaller is not None:
            return f"blocks with at least {self.smaller:.0%} fewer parameters"
        if self.structures:
            return " and ".join(
                _PARTS[name].format(f"{float(amount):.0%}" if amount < 1 else amount)
                for name, amount in self.structures.items()
            )
        return self.pattern if self.n_m else f"{self.sparsity:.0%} zeros"

    @property
    def vote_ties(self) -> str:
        """Tie rule for equal vote counts."""
        return self.server_ties or self.ties

    @property
    def n_m(self) -> tuple[int, int] | None:
        """``(N, M)`` of an N:M pattern, or None for an unstructured one."""
        match = _PATTERN.fullmatch(self.pattern)
        return (int(match[1]), int(match[2])) if match else None


def _implied_sparsity(match: re.Match[str]) -> Fraction:
    return 1 - Fraction(int(match[1]), int(match[2]))
