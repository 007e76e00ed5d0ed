"""What is configured in a federation: the coordinator's plan and runs, and each participant's own settings.

Nothing here imports torch or the engine.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import ByteSize, Field, model_validator

from fedprllm.config import PruneConfig, ShareName
from fedprllm.errors import ConfigError, did_you_mean
from fedprllm.settings import Settings, read_toml

__all__ = [
    "DEFAULT_ALLOWED",
    "DEFAULT_MESSAGE_MB",
    "Plan",
    "RunPlan",
    "SiteSettings",
    "read_plan",
    "read_run_plan",
]

# Every kind of update there is: the keys of `fedprllm.sharing.SHARING`, which needs torch.
KINDS = (*get_args(ShareName), "outliers")
DEFAULT_ALLOWED = ("mask",)
DEFAULT_MESSAGE_MB = 1024
# The strategies that a federation can run: the others need all text in one place, or no other participants.
FEDERATED = ("one-shot", "iterative")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = {"server", "coordinator", "admin"}


class Plan(Settings):
    """Who takes part and where the server is: what ``fedprllm federation init`` makes kits from.

    Raises:
        ConfigError: A name cannot be used, or occurs twice.
    """

    name: Annotated[str, Field(description="name of the federation, in its certificates")] = "fedprllm"
    server: Annotated[str, Field(description="host name at which participants reach the server")]
    port: Annotated[int, Field(ge=1, le=65535, description="the one port that must be open")] = 8002
    participants: Annotated[list[str], Field(min_length=1, description="one name for each participant")]
    scheme: Annotated[str, Field(description="grpc, or http where only a web proxy lets traffic out")] = (
        "grpc"
    )
    valid_days: Annotated[int, Field(ge=1, description="how long the certificates are valid")] = 360
    max_message_mb: Annotated[
        int, Field(ge=1, description="longest message that the server receives, in MB (10^6 bytes)")
    ] = DEFAULT_MESSAGE_MB

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in (self.name, *self.participants):
            if not _NAME.fullmatch(name) or name in _RESERVED:
                raise ConfigError(
                    f"'{name}' cannot name a federation or a participant: use lower-case letters, digits and "
                    f"dashes, at most 63, and none of {', '.join(sorted(_RESERVED))}"
                )
        twice = {name for name in self.participants if self.participants.count(name) > 1}
        if twice:
            raise ConfigError(f"participant '{min(twice)}' is named twice")
        if self.server in self.participants:
            raise ConfigError(f"'{self.server}' is the server: give the participant another name")
        if self.scheme not in ("grpc", "http", "tcp"):
            raise ConfigError(f"unknown scheme {did_you_mean(self.scheme, ('grpc', 'http', 'tcp'))}")
        return self


class RunPlan(Settings):
    """One run of a federation: which model, how it is pruned, and what happens when a participant fails.

    Raises:
        ConfigError: A strategy that needs no federation, a quorum that cannot be reached, a bad name.
    """

    name: Annotated[str, Field(description="folder of the run below the server's runs folder")]
    model: Annotated[str, Field(description="hub id, or a path on the server; participants name their own")]
    prune: Annotated[dict[str, Any], Field(description="options of pruning, as in fedprllm prune")] = Field(
        default_factory=dict
    )
    participants: Annotated[
        list[str], Field(description="names of the participants; all of the plan if empty")
    ] = Field(default_factory=list)
    quorum: Annotated[int, Field(ge=1, description="fewest participants with which the run goes on")] = 1
    deadline_s: Annotated[
        float, Field(gt=0, description="seconds a participant has for a block before it is left out")
    ] = 3600.0
    start_s: Annotated[
        float, Field(gt=0, description="seconds it has, on top, to read model and text before block 0")
    ] = 3600.0
    join_s: Annotated[
        float, Field(gt=0, description="seconds to wait for an absent participant before going on without")
    ] = 120.0
    silence_s: Annotated[
        float, Field(gt=0, description="seconds without any answer after which it counts as gone")
    ] = 30.0
    max_ballots: Annotated[
        int, Field(ge=1, description="invalid updates in a row after which a participant is left out")
    ] = 3
    max_attempts: Annotated[
        int, Field(ge=1, description="jobs in a row without any progress before giving up")
    ] = 5

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not _RUN_NAME.fullmatch(self.name):
            raise ConfigError(f"'{self.name}' cannot name a run: use letters, digits, dot, dash, underscore")
        config = self.config
        if config.strategy not in FEDERATED:
            raise ConfigError(
                f"strategy '{config.strategy}' cannot run in a federation: expected one of "
                f"{', '.join(FEDERATED)}; 'fedprllm prune' runs the others"
            )
        if self.participants and self.quorum > len(self.participants):
            raise ConfigError(
                f"a quorum of {self.quorum} cannot be reached by {len(self.participants)} participants"
            )
        return self

    @property
    def config(self) -> PruneConfig:
        """How to prune."""
        return PruneConfig(**self.prune)


class SiteSettings(Settings):
    """One participant's own settings: they stay on its machine and no message can change them."""

    data: Annotated[list[str], Field(description="text files of this participant")]
    model: Annotated[
        str | None, Field(description="where the model is here, if not the coordinator's id")
    ] = None
    device: Annotated[str | None, Field(description="where to compute, whatever the run says")] = None
    threads: Annotated[int | None, Field(ge=1, description="CPU threads at most")] = None
    memory_gb: Annotated[float | None, Field(gt=0, description="memory of the computation at most")] = None
    memory_limit: Annotated[
        ByteSize | None, Field(gt=0, description="memory for hidden states; what exceeds it goes to files")
    ] = None
    allow: Annotated[list[str], Field(description="kinds of update that may leave")] = Field(
        default_factory=lambda: list(DEFAULT_ALLOWED)
    )
    block_fraction: Annotated[
        float, Field(gt=0, le=1, description="share of the blocks that this participant prunes at most")
    ] = 1.0
    record: Annotated[str | None, Field(description="folder for a copy of every message that leaves")] = None
    min_windows: Annotated[int, Field(ge=1, description="fewest windows behind an update")] = 16
    min_tokens: Annotated[int, Field(ge=2, description="fewest tokens behind an update")] = 8192
    min_participants: Annotated[int, Field(ge=1, description="fewest participants of a run")] = 3
    runs_per_text: Annotated[int, Field(ge=1, description="runs that one text may be used in")] = 3
    seed: Annotated[
        int | None,
        Field(ge=0, description="seed for the choice of windows; drawn once and kept here by default"),
    ] = None
    confirm: Annotated[bool, Field(description="ask before the first computation of a run")] = True
    plan: Annotated[
        dict[str, Any] | None, Field(description="the one run that is accepted: model, config, participants")
    ] = None
    max_message_mb: Annotated[
        int, Field(ge=1, description="longest message that is received here, in MB (10^6 bytes)")
    ] = DEFAULT_MESSAGE_MB

    @model_validator(mode="after")
    def _check(self) -> Self:
        for kind in self.allow:
            if kind not in KINDS:
                raise ConfigError(f"allow: unknown kind of update {did_you_mean(kind, KINDS)}")
        return self


def read_plan(path: Path) -> Plan:
    """Read ``plan.toml``.

    Raises:
        ConfigError: The file or a value in it cannot be used.
    """
    try:
        return Plan(**read_toml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None


def read_run_plan(path: Path) -> RunPlan:
    """Read the ``config.toml`` of a run; a model path in it is relative to the file.

    Raises:
        ConfigError: The file or a value in it cannot be used.
    """
    values = read_toml(path)
    model = values.get("model")
    if isinstance(model, str) and (path.parent / model).exists():
        values["model"] = str((path.parent / model).resolve())
    try:
        return RunPlan(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
