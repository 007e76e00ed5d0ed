"""What a study measures: settings to compare, as grids over the options of a run.

A study is a list of cells. A cell is one configuration of a run, a number of participants, and the way the
text is distributed among them. The paper's questions are grids in the table `QUESTIONS`; users add their own
as ``[[grid]]`` tables in the configuration file. Nothing in this module imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fedprllm.config import PruneConfig
from fedprllm.errors import ConfigError, did_you_mean
from fedprllm.settings import Settings

__all__ = ["BY_DOMAIN", "PARTITIONS", "QUESTIONS", "STRANGERS", "Cell", "StudyConfig", "cells_of"]

# One participant per domain, or instead of them one with text that nobody has to share, or both.
STRANGERS: tuple[Literal["public"], Literal["generated"], Literal["random"]] = (
    "public",
    "generated",
    "random",
)
BY_DOMAIN = ("domain", *STRANGERS, "with-public")
PARTITIONS = ("iid", "dirichlet", *BY_DOMAIN)
_Values = dict[str, Sequence[Any]]
# Axes of a grid besides the fields of `PruneConfig`.
_OWN_AXES = ("participants", "partition")
# Options that a grid cannot vary, and why.
_FIXED = {
    "seed": "name the seeds with the study's own list, seeds",
    "dtype": "it is the same for a whole study: set it outside the grid, and make one study for each",
    "device": "it is the same for a whole study: set it outside the grid",
    "exclude": "a study prunes all Linears of the blocks",
    "memory_limit": "it does not affect a result",
    "max_update_mb": "it does not affect a result",
}
_TIES = ("index", "random", "magnitude")


class StudyConfig(Settings):
    """The model and texts of a study and the values that its questions range over.

    Questions that do not vary an option use the first value of its list.

    Raises:
        ConfigError: A value is unknown, out of range or contradicts another value.
    """

    subject: ClassVar[str] = "study: "

    model: Annotated[str, Field(description="hub id, local folder or GGUF file")]
    data: Annotated[
        tuple[str, ...], Field(description="text to distribute among the participants at random")
    ] = ()
    domains: Annotated[
        tuple[str, ...],
        Field(description="one text per participant, for participants that differ; a part is held out"),
    ] = ()
    public: Annotated[
        tuple[str, ...], Field(description="text that anyone has, to compare what participants share with")
    ] = ()
    eval: Annotated[
        tuple[str, ...], Field(description="text to measure on, except in questions about domains")
    ] = ()
    questions: Annotated[
        tuple[str, ...] | None, Field(description="questions to ask; by default all that the text allows")
    ] = None
    sparsity: Annotated[tuple[float, ...], Field(min_length=1, description="fractions of zeros")] = (0.5,)
    participants: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, description="numbers of participants")
    ] = (8,)
    windows: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        Field(min_length=1, description="windows per participant"),
    ] = (2,)
    ways: Annotated[
        tuple[Literal["mask", "structure", "6:8", "gram"], ...],
        Field(min_length=1, description="ways to prune in question no-sharing"),
    ] = ("mask", "structure", "6:8", "gram")
    against: Annotated[
        tuple[Literal["public", "generated", "random", "with-public"], ...],
        Field(min_length=1, description="text to compare with in question no-sharing"),
    ] = ("public", "generated", "random", "with-public")
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(min_length=1, description="every cell is measured once per seed"),
    ] = (0, 1, 2)
    window_length: Annotated[int, Field(ge=2, description="tokens per window")] = 512
    eval_tokens: Annotated[int, Field(ge=2, description="tokens to measure on per text, at most")] = 16384
    local_models: Annotated[
        int, Field(ge=1, description="maximum number of models pruned alone to measure")
    ] = 4
    alpha: Annotated[float, Field(gt=0, description="concentration of the dirichlet partition")] = 0.3
    bos: Literal["auto", "every", "start", "never"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, Field(description="device to compute on: cpu, cuda, ...")] = "cpu"
    grid: Annotated[
        tuple[dict[str, Any], ...], Field(description="additional grids over any option of prune")
    ] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for question in self.questions or ():
            if question not in QUESTIONS:
                raise ConfigError(f"unknown question {did_you_mean(question, QUESTIONS)}")
            if _needs_domains(QUESTIONS[question].grids(self)) and len(self.domains) < 2:
                raise ConfigError(
                    f"question {question} needs at least two domains, found {len(self.domains)}: name one "
                    "text for each with --domains"
                )
            if QUESTIONS[question].needs_public and not self.public:
                raise ConfigError(
                    f"question {question} compares with public text, found none: name it with --public"
                )
        if not self.data and not self.domains:
            raise ConfigError("no text: name data to distribute, or domains with one participant each")
        for number, grid in enumerate(self.grid, start=1):
            empty = [axis for axis, values in grid.items() if values == []]
            if empty or not grid:
                what = f"{empty[0]} has no values" if empty else "it names no option"
                raise ConfigError(f"grid {number}: {what}, so that it measures nothing")
        if not self.asked and not self.grid:
            raise ConfigError(
                f"nothing to measure with {len(self.domains)} domain and no data: name a second text with "
                "--domains, or text to distribute with --data"
                if self.questions is None
                else "nothing to measure: name a question, or a [[grid]] in the file"
            )
        if self.data and not self.eval:
            raise ConfigError(
                "no text to measure on: name texts with eval that are not in the calibration data"
            )
        return self

    @property
    def asked(self) -> list[str]:
        """The questions to ask, in the order of the table."""
        if self.questions is not None:
            return [name for name in QUESTIONS if name in self.questions]
        have_domains, have_data = len(self.domains) > 1, bool(self.data)
        return [
            name
            for name, question in QUESTIONS.items()
            if (have_domains if _needs_domains(question.grids(self)) else have_data)
            and (self.public or not question.needs_public)
        ]


@dataclass(frozen=True)
class Question:
    """A question and the grids that answer it.

    Attributes:
        title: Heading.
        paper: What the paper finds, or that it does not ask the question.
        grids: Function that makes the grids from the study's lists of values.
        pairs: Comparisons that answer the question, ``(axis, value, other value)`` with all else equal.
        by: Axes for each of whose values the comparisons are made separately.
        needs_public: Whether it compares with public text.
    """

    title: str
    paper: str
    grids: Any
    pairs: tuple[tuple[str, Any, Any], ...] = ()
    by: tuple[str, ...] = ()
    needs_public: bool = False


def _domains(**values: Sequence[Any]) -> _Values:
    return {"partition": ["domain"], **values}


def _no_sharing(study: StudyConfig) -> list[_Values]:
    """Together, alone, and with text that nobody has to share, for each of several ways to prune."""
    ways: dict[str, _Values] = {
        "mask": {"sparsity": study.sparsity, "share": ["mask"], "strategy": ["one-shot"]},
        "structure": {"structure": ["mlp=0.2"], "strategy": ["iterative"]},
        "6:8": {"pattern": ["6:8"], "share": ["gram"], "strategy": ["iterative"]},
        "gram": {"sparsity": study.sparsity, "share": ["gram"], "strategy": ["iterative"]},
    }
    return [
        grid
        for way in (ways[name] for name in study.ways)
        for grid in (
            {**way, "partition": ["domain", *study.against]},
            _domains(**{**way, "strategy": ["local-only"]}),
        )
    ]


QUESTIONS: dict[str, Question] = {
    "no-sharing": Question(
        "Is anyone's private text needed?",
        "Not asked in the paper. Public text, text that the model writes itself and random tokens cost "
        "no one anything; each is used in the amount that all participants have together.",
        _no_sharing,
        tuple(("partition", other, "domain") for other in (*STRANGERS, "with-public")),
        ("structure", "share", "pattern", "sparsity"),
        needs_public=True,
    ),
    "methods": Question(
        "Together, alone, or with pooled text",
        "Finding 4: pruning together beats pruning alone and comes close to pooled text.",
        lambda s: [{"sparsity": s.sparsity, "strategy": ["one-shot", "local-only", "centralized"]}],
        (("strategy", "local-only", "one-shot"), ("strategy", "centralized", "one-shot")),
        ("sparsity",),
    ),
    "groups": Question(
        "Comparison groups",
        "Finding 1: with local groups by row, the server can compare by layer or by row, but collapses by "
        "column. With local groups by layer, only layer works at the server; with local groups by column, "
        "layer and column work.",
        lambda _: [
            {"local_group": ["row", "layer", "column"], "server_group": ["layer", "row", "column"]},
        ],
        (("server_group", "layer", "row"), ("server_group", "layer", "column")),
        ("local_group",),
    ),
    "ties": Question(
        "Tie rule",
        "The paper's code breaks ties at random for layer and by lowest index for row and column.",
        lambda s: [
            {"server_group": ["layer", "row", "column"], "server_ties": list(_TIES)},
            {"sparsity": s.sparsity, "server_ties": list(_TIES)},
        ],
        (("server_ties", "index", "random"), ("server_ties", "index", "magnitude")),
        ("server_group",),
    ),
    "scaling": Question(
        "Scaling the kept weights by the votes",
        "Finding 2: weight scaling hurts.",
        lambda s: [{"sparsity": s.sparsity, "scale_weights": [False, True]}],
        (("scale_weights", False, True),),
        ("sparsity",),
    ),
    "rounds": Question(
        "One round, or one round per block",
        "Finding 3: iterative is no better than one-shot.",
        lambda s: [{"sparsity": s.sparsity, "strategy": ["one-shot", "iterative"]}],
        (("strategy", "one-shot", "iterative"),),
        ("sparsity",),
    ),
    "participants": Question(
        "Number of participants",
        "Finding 4: pruning together beats pruning alone at every number of participants from 2 to 64.",
        lambda s: [
            {"strategy": ["one-shot", "local-only", "centralized"], "participants": s.participants},
        ],
        (("strategy", "local-only", "one-shot"), ("strategy", "centralized", "one-shot")),
        ("participants",),
    ),
    "windows": Question(
        "Amount of text per participant",
        "Not asked in the paper, where each participant holds two samples.",
        lambda s: [{"windows": s.windows, "strategy": ["one-shot", "local-only"]}],
        (("strategy", "local-only", "one-shot"),),
    ),
    "sharing": Question(
        "What is shared",
        "Not asked in the paper, which shares only masks.",
        lambda s: [
            {"sparsity": s.sparsity, "share": ["mask", "statistics"]},
            {"share": ["weights", "gram"]},
        ],
        (("share", "mask", "statistics"), ("share", "mask", "weights"), ("share", "mask", "gram")),
    ),
    "criteria": Question(
        "Pruning criterion",
        "Not asked in the paper, which uses only Wanda.",
        lambda _: [
            {"criterion": ["wanda", "magnitude"]},
            {"criterion": ["ria"], "local_group": ["layer", "row"]},
        ],
        (("criterion", "wanda", "magnitude"), ("criterion", "wanda", "ria")),
    ),
    "allocation": Question(
        "Uniform sparsity, or more in the blocks that tolerate it",
        "Not asked in the paper; OWL's paper finds that it matters more than the criterion at high sparsity.",
        lambda s: [{"sparsity": s.sparsity, "allocation": ["uniform", "owl"]}],
        (("allocation", "uniform", "owl"),),
        ("sparsity",),
    ),
    "domains": Question(
        "Participants with different text",
        "Not asked in the paper, which distributes a single corpus at random.",
        lambda _: [
            _domains(strategy=["one-shot", "local-only", "centralized"]),
            _domains(share=["statistics"]),
        ],
        (("strategy", "centralized", "one-shot"), ("share", "mask", "statistics")),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One setting with one seed.

    Attributes:
        config: Configuration of the run.
        participants: Number of participants.
        partition: How the text is distributed among them: one of `PARTITIONS`.
        questions: Questions that the cell helps to answer.
    """

    config: PruneConfig
    participants: int
    partition: str
    questions: tuple[str, ...] = ()

    @property
    def setting(self) -> dict[str, Any]:
        """Everything but the seed, as JSON values."""
        values = self.config.model_dump(mode="json", exclude={"seed"})
        return {**values, "participants": self.participants, "partition": self.partition}

    @property
    def setting_key(self) -> str:
        """The setting as one string that is equal only for equal settings."""
        return json.dumps(self.setting, sort_keys=True)

    @property
    def key(self) -> str:
        """A name for files: a hash of the setting and the seed."""
        text = json.dumps([self.setting, self.config.seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def label(self) -> str:
        """The options that differ from their defaults, for progress and messages."""
        fields = PruneConfig.model_fields
        given = {k: v for k, v in self.setting.items() if k not in fields or v != fields[k].default}
        given.pop("window_length", None)
        return " ".join(f"{name}={value}" for name, value in given.items())


def cells_of(study: StudyConfig) -> list[Cell]:
    """Every cell of the study once, grouped by seed.

    Raises:
        ConfigError: A grid names an unknown option or an invalid combination of options.
    """
    cells: dict[str, Cell] = {}
    for seed in study.seeds:
        for question, grid in _grids(study):
            for values in _combinations(grid):
                cell = _cell(study, values, seed, question)
                known = cells.get(cell.key)
                asked = (*known.questions, question) if known else (question,)
                cells[cell.key] = replace(cell, questions=tuple(dict.fromkeys(asked)))
    return list(cells.values())


def _grids(study: StudyConfig) -> Iterator[tuple[str, _Values]]:
    for name in study.asked:
        for grid in QUESTIONS[name].grids(study):
            yield name, grid
    for number, grid in enumerate(study.grid, start=1):
        known = [*PruneConfig.model_fields, *_OWN_AXES]
        for axis in grid:
            if axis not in known:
                raise ConfigError(f"grid {number}: unknown option {did_you_mean(axis, known)}")
            if axis in _FIXED:
                raise ConfigError(f"grid {number}: {axis} cannot be an axis: {_FIXED[axis]}")
        yield f"grid {number}", {k: v if isinstance(v, list) else [v] for k, v in grid.items()}


def _combinations(grid: _Values) -> Iterator[dict[str, Any]]:
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _cell(study: StudyConfig, values: Mapping[str, Any], seed: int, question: str) -> Cell:
    values = dict(values)
    partition = values.pop("partition", "iid" if study.data else "domain")
    if partition not in PARTITIONS:
        raise ConfigError(f"{question}: unknown partition {did_you_mean(partition, PARTITIONS)}")
    if partition != "iid" and not study.domains:
        raise ConfigError(f"{question}: partition {partition} needs domains, found none: name their texts")
    if partition in ("public", "with-public") and not study.public:
        raise ConfigError(f"{question}: partition {partition} needs public text, found none: name it")
    if partition == "iid" and not study.data:
        raise ConfigError(f"{question}: partition iid needs data, found none: name texts to distribute")
    if partition in BY_DOMAIN and "participants" in values:
        raise ConfigError(
            f"{question}: participants cannot be an axis with partition {partition}, where each of the "
            f"{len(study.domains)} domains is one participant: leave it out, or use partition dirichlet"
        )
    n = values.pop("participants", study.participants[0])
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError(f"{question}: participants must be whole numbers from 1 on, found {n!r}")
    base = {
        "sparsity": study.sparsity[0],
        "windows": study.windows[0],
        "window_length": study.window_length,
        "bos": study.bos,
        "dtype": study.dtype,
        "device": study.device,
        "seed": seed,
    }
    if "pattern" in values or "structure" in values:
        del base["sparsity"]
    try:
        config = PruneConfig(**(base | values))
    except ConfigError as error:
        raise ConfigError(f"{question}: {error}") from None
    # Naming the participants' rule explicitly is the same setting as the default.
    if config.server_ties == config.ties:
        config = config.model_copy(update={"server_ties": None})
    return Cell(config, _n_participants(study, partition, n), partition)


def _n_participants(study: StudyConfig, partition: str, asked: int) -> int:
    if partition in STRANGERS:
        return 1
    by_domain = {"domain": len(study.domains), "with-public": len(study.domains) + 1}
    return by_domain.get(partition, asked)


def _needs_domains(grids: Sequence[_Values]) -> bool:
    return any(partition != "iid" for grid in grids for partition in grid.get("partition", ()))
