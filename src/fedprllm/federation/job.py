"""One job of the coordinator: opens or continues a run, conducts it, and writes its result.

A run is a sequence of jobs over one folder; each leaves in ``federation/outcome.json`` how it ended.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprllm.config import PruneConfig
from fedprllm.core.allocation import Outliers
from fedprllm.errors import ConfigError, FedprllmError, RunError
from fedprllm.federation.aggregation import people_of
from fedprllm.federation.allocation import allocated, allocation_record, sampled, survey_config
from fedprllm.federation.channel import Channel, Interrupted, QuorumLost
from fedprllm.federation.coordinator import Coordinator
from fedprllm.federation.fingerprints import model_digest, tensor_fingerprints
from fedprllm.federation.plan import RunPlan
from fedprllm.files import write_json, write_text
from fedprllm.models.blocks import BlockwiseModel
from fedprllm.runs import Run, versions
from fedprllm.strategies import STRATEGIES

__all__ = ["conduct_run", "run_id_of"]

_LOCK_WAIT_S = 30.0


def run_id_of(folder: Path) -> bytes:
    """The 16 bytes that name a run, drawn when its folder is first used."""
    path = folder / ".run-id"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, uuid.uuid4().hex)
    return bytes.fromhex(path.read_text(encoding="utf-8").strip())


def conduct_run(
    plan: RunPlan,
    names: Sequence[str],
    runs: Path,
    job: str,
    channel: Channel,
    stopped: Callable[[], bool] = lambda: False,
    max_message_mb: float | None = None,
) -> str:
    """Work on a run until it is complete or cannot go on, and write down how it ended.

    Args:
        plan: what to run.
        names: everyone in the federation; the plan may name fewer.
        runs: folder of all runs.
        job: name of this job, for the outcome.
        channel: how to reach the participants.
        stopped: asked between steps; True ends the job.
        max_message_mb: what the sites and the server receive at most; no limit by default.

    Returns:
        ``complete``, ``interrupted``, ``quorum lost`` or ``error``: what the outcome says.
    """
    folder = runs / plan.name
    try:
        _conduct(plan, names, folder, channel, stopped, max_message_mb)
        outcome, reason = "complete", ""
    except Interrupted as interruption:
        outcome, reason = "interrupted", str(interruption)
    except QuorumLost as error:
        outcome, reason = "quorum lost", str(error)
    except FedprllmError as error:
        outcome, reason = "error", str(error)
    write_json(folder / "federation" / "outcome.json", {"job": job, "outcome": outcome, "reason": reason})
    return outcome


def _conduct(
    plan: RunPlan,
    names: Sequence[str],
    folder: Path,
    channel: Channel,
    stopped: Callable[[], bool],
    max_message_mb: float | None,
) -> None:
    from fedprllm.evaluation import window_length_for
    from fedprllm.federation.checks import (
        check_message_size,
        check_pattern_divides,
        check_update_size,
        needed_bytes,
    )
    from fedprllm.models.source import resolve_model

    taking_part = _taking_part(plan, names)
    config = plan.config
    model = BlockwiseModel(resolve_model(plan.model), config.dtype, config.device)
    check_pattern_divides(model, config)
    check_update_size(model, config)
    if max_message_mb is not None:
        check_message_size(model, config, max_message_mb)
    config = config.model_copy(update={"window_length": window_length_for(model, config.window_length)})
    sampled(config, taking_part, model.n_blocks)
    fingerprints = tensor_fingerprints(model)
    run_id = run_id_of(folder)
    identity: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "model": {"source": plan.model, "fingerprint": model_digest(fingerprints).hex()},
        "participants": {name: {} for name in taking_part},
        "evaluation": {},
        "versions": versions(),
        "run_id": run_id.hex(),
    }
    run = Run(folder, identity, needed_bytes(model, [], config))
    _enter_when_free(run)
    try:
        if run.result is None:
            conducting = _Conducting(model, fingerprints, plan, taking_part, channel, stopped)
            outliers = conducting.survey(run, config, identity)
            if outliers:
                model.linears = allocated(model, outliers, config)
            coordinator = conducting.coordinator(run, config, run_id, outliers=outliers)
            coordinator.conduct()
            coordinator.aggregator.finish()
            _finish(run, model, identity, outliers)
            coordinator.finish()
    finally:
        run.__exit__(None, None, None)


@dataclass
class _Conducting:
    """What a run and the survey before it have in common."""

    model: BlockwiseModel
    fingerprints: Mapping[str, str]
    plan: RunPlan
    names: Sequence[str]
    channel: Channel
    stopped: Callable[[], bool]

    def coordinator(self, run: Run, config: PruneConfig, run_id: bytes, **options: Any) -> Coordinator:
        """A coordinator of one of the two."""
        return Coordinator(
            self.model,
            self.fingerprints,
            config,
            self.plan,
            self.names,
            run,
            run_id,
            self.channel,
            self.stopped,
            **options,
        )

    def survey(self, run: Run, config: PruneConfig, identity: Mapping[str, Any]) -> list[Outliers]:
        """Outliers by block, counted in a run of its own in the run's folder; none if not asked for."""
        if config.allocation == "uniform":
            return []
        folder = run.folder / "survey"
        run_id = run_id_of(folder)
        with Run(folder, {**identity, "run_id": run_id.hex()}) as counting:
            if counting.result is None:
                coordinator = self.coordinator(
                    counting,
                    survey_config(config),
                    run_id,
                    folder=run.folder / "federation",
                    survey=True,
                )
                coordinator.conduct()
                counting.finish({"blocks": counting.records()})
                coordinator.finish()
            return [Outliers(*record["outliers"]) for record in counting.records()]


def _taking_part(plan: RunPlan, names: Sequence[str]) -> list[str]:
    unknown = sorted(set(plan.participants) - set(names))
    if unknown:
        raise ConfigError(
            f"participant '{unknown[0]}' is not in this federation: it has {', '.join(sorted(names))}"
        )
    taking_part = sorted(plan.participants or names)
    if plan.quorum > len(taking_part):
        raise ConfigError(f"a quorum of {plan.quorum} cannot be reached by {len(taking_part)} participants")
    return taking_part


def _enter_when_free(run: Run) -> None:
    """Take the run's folder; a job that was killed a moment ago may still hold it."""
    end = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            run.__enter__()
        except RunError as error:
            if "another process works on" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.5)
        else:
            return


def _finish(run: Run, model: Any, identity: dict[str, Any], outliers: Sequence[Outliers]) -> None:
    """Write the result, in the same form as a run in one process."""
    from fedprllm.model_card import write_model_card

    records = run.records()
    config = identity["config"]
    people = people_of(records, config["window_length"])
    surveyed = Run(run.folder / "survey", {}).records()
    for record in surveyed:
        for name, n_bytes in record["update_bytes"].items():
            if name in people:
                people[name]["update_bytes"] += n_bytes
    follows_server = STRATEGIES[config["strategy"]].follows_server
    result = {
        **identity,
        "participants": people,
        "models": {"model": str(run.model_dir().relative_to(run.folder))},
        "n_prunable": model.n_prunable,
        "n_participants": len(people),
        "rounds": (model.n_blocks if follows_server else 1) + bool(surveyed),
        "update_bytes_per_block": [max(record["update_bytes"].values(), default=0) for record in records],
        "survey_bytes_per_block": [max(record["update_bytes"].values(), default=0) for record in surveyed]
        or [0] * len(records),
        "outlier_ratios": allocation_record({None: outliers} if outliers else {}),
        "evaluation": {},
        "blocks": records,
    }
    write_model_card(run.model_dir(), result)
    run.finish(result)
