"""Configuration of a federation: the coordinator's plan and runs, and each participant's own settings.

This module imports neither torch nor the engine.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import ByteSize, Field, model_validator

from fedprllm.config import PruneConfig, ShareName
from fedprllm.errors import ConfigError, did_you_mean
from fedprllm.healing.config import HealConfig
from fedprllm.settings import Settings, read_toml

__all__ = [
    "DEFAULT_ALLOWED",
    "DEFAULT_MESSAGE_MB",
    "Plan",
    "RunPlan",
    "SiteSettings",
    "check_name",
    "read_plan",
    "read_run_plan",
]

# All kinds of update. They repeat the keys of `fedprllm.sharing.SHARING`, whose import needs torch.
KINDS = (*get_args(ShareName), "outliers", "gradients")
DEFAULT_ALLOWED = ("mask",)
DEFAULT_MESSAGE_MB = 1024
# Strategies a federation can run. The others need all text in one place or involve a single participant.
FEDERATED = ("one-shot", "iterative")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HOST = re.compile(r"([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?")
_RESERVED = {"server", "coordinator", "admin"}


class Plan(Settings):
    """The participants and the server's address, from which ``fedprllm federation init`` writes the kits.

    Raises:
        ConfigError: A name or the server's host is invalid, a name occurs twice, the scheme is unknown, or
            the authority would not outlive the certificates.
    """

    name: Annotated[str, Field(description="name of the federation in its certificates")] = "fedprllm"
    server: Annotated[str, Field(description="host name at which participants reach the server")]
    port: Annotated[int, Field(ge=1, le=65535, description="the one port that must be open")] = 8002
    participants: Annotated[list[str], Field(min_length=1, description="one name per participant")]
    scheme: Annotated[str, Field(description="grpc, or http where traffic must pass through a web proxy")] = (
        "grpc"
    )
    valid_days: Annotated[int, Field(ge=1, description="days that a certificate is valid")] = 360
    authority_days: Annotated[
        int, Field(ge=2, description="days that the authority signing the certificates is valid")
    ] = 3650
    max_message_mb: Annotated[
        int, Field(ge=1, description="longest message the server accepts, in MB (10^6 bytes)")
    ] = DEFAULT_MESSAGE_MB

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in (self.name, *self.participants):
            check_name(name)
        twice = {name for name in self.participants if self.participants.count(name) > 1}
        if twice:
            raise ConfigError(
                f"participant '{min(twice)}' is named twice: give each participant its own name"
            )
        if len(self.server) > 253 or not _HOST.fullmatch(self.server):
            raise ConfigError(
                f"server: '{self.server}' is no host name: expected a name such as server.example.org or an "
                "IPv4 address, without https://, port or path; the port is an option of its own"
            )
        if self.server in self.participants:
            raise ConfigError(
                f"'{self.server}' is the server's host name: give the participant a different name"
            )
        if self.authority_days <= self.valid_days:
            raise ConfigError(
                f"authority_days is {self.authority_days} and valid_days is {self.valid_days}: the "
                "authority must outlive the certificates that it signs, or they cannot be renewed"
            )
        if self.scheme not in ("grpc", "http", "tcp"):
            raise ConfigError(f"unknown scheme {did_you_mean(self.scheme, ('grpc', 'http', 'tcp'))}")
        return self


class RunPlan(Settings):
    """One run of a federation: the model, how to prune it, and what to do when a participant fails.

    Raises:
        ConfigError: The name is invalid, no federation can run the strategy, the quorum cannot be reached,
            or a pruning option is invalid.
    """

    name: Annotated[str, Field(description="name of the run's folder in the server's runs folder")]
    model: Annotated[
        str, Field(description="hub id, or a path on the server; a participant may name its own copy")
    ] = ""
    heal: Annotated[
        dict[str, Any] | None,
        Field(description="options of healing, as in fedprllm heal; the run then heals instead of pruning"),
    ] = None
    of: Annotated[
        str, Field(description="heal the result of the run of this name, which participants have")
    ] = ""
    prune: Annotated[dict[str, Any], Field(description="pruning options, as in fedprllm prune")] = Field(
        default_factory=dict
    )
    participants: Annotated[
        list[str], Field(description="names of the participants; if empty, all participants of the plan")
    ] = Field(default_factory=list)
    quorum: Annotated[int, Field(ge=1, description="fewest participants with which the run continues")] = 1
    deadline_s: Annotated[
        float, Field(gt=0, description="seconds a participant has for a block before it is left out")
    ] = 3600.0
    start_s: Annotated[
        float, Field(gt=0, description="additional seconds to read the model and the text before block 0")
    ] = 3600.0
    join_s: Annotated[
        float, Field(gt=0, description="seconds to wait for an absent participant before leaving it out")
    ] = 120.0
    silence_s: Annotated[
        float, Field(gt=0, description="seconds of silence after which a participant counts as gone")
    ] = 30.0
    max_colluding: Annotated[
        int, Field(ge=0, description="with secure: participants that may conspire with the server, as agreed")
    ] = 1
    left_out_receive: Annotated[
        bool, Field(description="whether participants that were left out may fetch the result too")
    ] = True
    max_ballots: Annotated[
        int, Field(ge=1, description="consecutive invalid updates after which a participant is left out")
    ] = 3
    max_attempts: Annotated[
        int, Field(ge=1, description="consecutive jobs without progress before giving up")
    ] = 5

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not _RUN_NAME.fullmatch(self.name):
            raise ConfigError(
                f"'{self.name}' cannot name a run: use 1 to 100 letters, digits, dots, dashes and "
                "underscores, and begin with a letter or a digit"
            )
        self._check_healing()
        config = self.config
        if config.strategy not in FEDERATED:
            raise ConfigError(
                f"strategy '{config.strategy}' cannot run in a federation: expected one of "
                f"{', '.join(FEDERATED)}; 'fedprllm prune' runs the others"
            )
        if config.smaller is not None:
            raise ConfigError(
                f"smaller {config.smaller:g} measures a pruned model for every structure that it could "
                "choose, and participants have a model only once a run has ended: run 'fedprllm prune "
                f"--smaller {config.smaller:g}' on text that you may use, which names the structure, and "
                'write it under [prune], for instance structure = "mlp=0.27"'
            )
        if self.participants and self.quorum > len(self.participants):
            raise ConfigError(
                f"a quorum of {self.quorum} cannot be reached by {len(self.participants)} participants: "
                "lower the quorum or name more participants"
            )
        return self

    def _check_healing(self) -> None:
        if "model" not in self.model_fields_set and not self.of:
            raise ConfigError("model is missing: name a hub id or a path on the server")
        if self.heal is None and self.of:
            raise ConfigError(
                f"of names the run '{self.of}', whose result would be healed, but there is no [heal]: add "
                "rounds = 40 under [heal], or leave it out"
            )
        if self.heal is not None and self.prune:
            raise ConfigError(
                "[heal] heals a model that is pruned already, found [prune] beside it: prune in one run, and "
                "heal its result in a second with of = NAME"
            )
        if self.heal is not None and self.of and self.model:
            raise ConfigError(f"of names the run '{self.of}', and model '{self.model}': give one of them")
        if self.healing is not None and self.healing.loss == "dense" and not self.of:
            raise ConfigError(
                "[heal] loss dense compares with the model before pruning, which is that of an earlier run: "
                "name the run with of instead of the model"
            )

    @property
    def healing(self) -> HealConfig | None:
        """The options of healing, validated; None if the run prunes."""
        return None if self.heal is None else HealConfig(**self.heal)

    @property
    def config(self) -> PruneConfig:
        """The pruning options, validated; of a run that heals, those of reading text and computing."""
        return PruneConfig(**self.prune) if self.heal is None else HealConfig(**self.heal).reading

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of update that a participant sends during the run."""
        return self.config.kinds if self.heal is None else ("gradients",)


class SiteSettings(Settings):
    """One participant's own settings. They stay on its machine, and no message can change them.

    Raises:
        ConfigError: A value is out of range, or a kind of update is unknown.
    """

    data: Annotated[list[str], Field(description="this participant's text files")]
    model: Annotated[
        str | None, Field(description="local copy of the model, if not the coordinator's hub id")
    ] = None
    device: Annotated[str | None, Field(description="device to compute on, whatever the run says")] = None
    threads: Annotated[int | None, Field(ge=1, description="maximum number of CPU threads")] = None
    memory_gb: Annotated[
        # The libraries alone take about 0.4 GB, and end a process without a word where they get less.
        float | None, Field(ge=0.5, description="maximum memory of the computation, GB")
    ] = None
    memory_limit: Annotated[
        ByteSize | None, Field(gt=0, description="memory for hidden states; the excess goes to files")
    ] = None
    allow: Annotated[list[str], Field(description="kinds of update that may be sent")] = Field(
        default_factory=lambda: list(DEFAULT_ALLOWED)
    )
    block_fraction: Annotated[
        float, Field(gt=0, le=1, description="largest share of the blocks this participant prunes")
    ] = 1.0
    record: Annotated[str | None, Field(description="folder for a copy of every message sent")] = None
    min_windows: Annotated[int, Field(ge=1, description="fewest windows an update may be based on")] = 16
    min_tokens: Annotated[int, Field(ge=2, description="fewest tokens an update may be based on")] = 8192
    require_secure: Annotated[
        bool, Field(description="share only under masks, so that the server sees nothing but sums")
    ] = False
    max_colluding: Annotated[
        int, Field(ge=0, description="participants that may conspire with the server, under masks")
    ] = 1
    min_sum: Annotated[int, Field(ge=3, description="fewest updates in a sum, under masks")] = 3
    min_participants: Annotated[int, Field(ge=1, description="fewest participants a run may have")] = 3
    max_rounds: Annotated[
        int, Field(ge=1, description="most rounds of healing in a run, each with one gradient")
    ] = 100
    min_gradient_tokens: Annotated[
        int, Field(ge=1, description="fewest tokens that a gradient may be computed from")
    ] = 256
    runs_per_text: Annotated[int, Field(ge=1, description="number of runs that may use one text")] = 3
    seed: Annotated[
        int | None,
        Field(ge=0, description="seed for choosing windows; by default drawn once and kept on this machine"),
    ] = None
    confirm: Annotated[bool, Field(description="ask before a run's first computation")] = True
    result: Annotated[bool, Field(description="build the pruned model here at the end of a run")] = True
    out: Annotated[str | None, Field(description="folder for results, if not the kit's runs folder")] = None
    fetch: Annotated[
        str | None, Field(description="the only run whose result to fetch, again if its model is gone")
    ] = None
    held_out: Annotated[
        list[str], Field(description="text on which dense and pruned model are measured; numbers are sent")
    ] = Field(default_factory=list)
    plan: Annotated[
        dict[str, Any] | None, Field(description="the only run to accept: model, config, participants")
    ] = None
    max_message_mb: Annotated[
        int, Field(ge=1, description="longest message accepted here, in MB (10^6 bytes)")
    ] = DEFAULT_MESSAGE_MB

    @model_validator(mode="after")
    def _check(self) -> Self:
        for kind in self.allow:
            if kind not in KINDS:
                raise ConfigError(f"allow: unknown kind of update {did_you_mean(kind, KINDS)}")
        return self


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a federation or a participant.

    Raises:
        ConfigError: Says what a name looks like.
    """
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise ConfigError(
            f"'{name}' cannot name a federation or a participant: use 1 to 63 lowercase letters, digits and "
            f"inner dashes, and none of the reserved names {', '.join(sorted(_RESERVED))}"
        )


def read_plan(path: Path) -> Plan:
    """Read ``plan.toml``.

    Raises:
        ConfigError: The file cannot be read, or a value in it is invalid.
    """
    try:
        return Plan(**read_toml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None


def read_run_plan(path: Path) -> RunPlan:
    """Read the ``config.toml`` of a run. A model path in it is relative to the file.

    Raises:
        ConfigError: The file cannot be read, or a value in it is invalid.
    """
    values = read_toml(path)
    model = values.get("model")
    if isinstance(model, str) and (path.parent / model).exists():
        values["model"] = str((path.parent / model).resolve())
    try:
        return RunPlan(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
