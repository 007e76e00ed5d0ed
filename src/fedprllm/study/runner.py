"""``study``: measure every cell once, store the measurements and write the results.

OUT/
  cells/KEY.json     one measured cell; a study that was stopped continues with the missing cells
  walks/KEY/         stored updates of one participant, for use by further cells; may be deleted
  texts/             the domains, each split into a calibration part and a held-out part
  results.json .csv .md, report.html, plots/
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from fedprllm.errors import RunError
from fedprllm.evaluation.results import Perplexity
from fedprllm.files import free_bytes, read_sealed, remove_temporary, write_sealed
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.fingerprints import model_digest
from fedprllm.models.identity import model_identity
from fedprllm.models.source import resolve_model
from fedprllm.progress import Progress, silent
from fedprllm.pruning.inputs import check_outside
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.preflight import check_pattern_divides, check_update_size
from fedprllm.pruning.run_folder import versions
from fedprllm.study.data import StudyData
from fedprllm.study.kept_updates import KeptWalks, is_served
from fedprllm.study.measure import Lab, n_alone, passes
from fedprllm.study.questions import Cell, StudyConfig, cells_of
from fedprllm.study.records import CellRecord, StudiedModel
from fedprllm.study.results import Results
from fedprllm.study.written import write_results
from fedprllm.text.windows import fingerprint

__all__ = ["study"]

_Known = TypeVar("_Known")


@dataclass(frozen=True)
class _Job:
    """A cell with everything that is needed to measure it, and the file of its record."""

    cell: Cell
    participants: list[Participant]
    texts: dict[str, list[Tensor]]
    file: Path


def study(config: StudyConfig, out: str | Path, progress: Progress = silent) -> Results:
    """Measure all cells of a study that are not measured yet, and write tables, plots and a page.

    Args:
        config: What to compare, on which model and texts.
        out: Folder of the study; a study that was stopped or extended continues there.
        progress: Notified of every window that went through a block.

    Returns:
        The results as written.

    Raises:
        ConfigError, DataError, ModelError: An input is invalid; detected before anything is computed.
        RunError: Another process is working on the folder, or the disk has too little free space.
    """
    out = Path(out)
    check_outside(out, [*config.data, *config.domains, *config.public, *config.eval])
    cells = cells_of(config)
    model = BlockwiseModel(resolve_model(config.model, progress=progress), config.dtype, config.device)
    for cell in cells:
        check_pattern_divides(model, cell.config)
        check_update_size(model, cell.config)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"another process is working on {out}: wait for it, or choose another folder with --out"
        ) from None
    with lock:
        return _study(config, cells, model, out, progress)


def _study(
    config: StudyConfig, cells: list[Cell], model: BlockwiseModel, out: Path, progress: Progress
) -> Results:
    remove_temporary(out)
    data = StudyData(model, config, out / "texts")
    digest = model_digest(model_identity(model, progress)).hex()
    walks = KeptWalks(model, digest, out / "walks")
    jobs = [_job(cell, data, digest, out) for cell in cells]
    dense_texts = {job.cell.partition == "iid": job.texts for job in jobs}
    dense = {
        is_iid: out / "cells" / f"dense-{_hash([digest, _fingerprints(texts)])}.json"
        for is_iid, texts in dense_texts.items()
    }
    # What a disk has damaged is measured again, like what is missing.
    known = {job.file: _known(job.file, CellRecord.model_validate) for job in jobs}
    known_dense = {is_iid: _known(file, _rows) for is_iid, file in dense.items()}
    left = [job for job in jobs if known[job.file] is None]
    dense_left = [is_iid for is_iid, rows in known_dense.items() if rows is None]
    _check_space(left, model, walks, out)
    total = sum(_n_steps(dense_texts[is_iid], 1, model.n_blocks) for is_iid in dense_left)
    lab = Lab(model, walks, out / "unfinished")
    with progress(f"studying {len(left)} cells", total + _planned(left, config, model, walks)) as advance:
        for is_iid in dense_left:
            known_dense[is_iid] = rows = lab.dense(dense_texts[is_iid], advance)
            write_sealed(dense[is_iid], {"rows": [row.as_json() for row in rows]})
        for job in left:
            record = lab.measure(job.cell, job.participants, job.texts, _n_models(job, config), advance)
            write_sealed(job.file, record.as_json())
            known[job.file] = CellRecord.model_validate(read_sealed(job.file))
    shutil.rmtree(out / "unfinished", ignore_errors=True)
    results = Results(
        config=config,
        cells=[(job.cell, _there(known[job.file])) for job in jobs],
        dense=[row for rows in known_dense.values() for row in _there(rows)],
        model=StudiedModel(source=config.model, fingerprint=digest, n_prunable=model.n_prunable),
        versions=versions(),
    )
    write_results(results, out)
    return results


def _known(file: Path, read: Callable[[dict[str, Any]], _Known]) -> _Known | None:
    """What an earlier process measured; None if it did not, or if the file is damaged."""
    try:
        return read(read_sealed(file))
    except (FileNotFoundError, RunError, ValueError):
        return None


def _there(value: _Known | None) -> _Known:
    assert value is not None, "everything that was left has been measured"
    return value


def _rows(value: dict[str, Any]) -> list[Perplexity]:
    return [Perplexity(**row) for row in value["rows"]]


def _job(cell: Cell, data: StudyData, digest: str, out: Path) -> _Job:
    participants, texts = data.participants(cell), data.texts(cell)
    name = _hash(
        [digest, cell.key, [participant.fingerprint for participant in participants], _fingerprints(texts)]
    )
    return _Job(cell, participants, texts, out / "cells" / f"{name}.json")


def _fingerprints(texts: dict[str, list[Tensor]]) -> dict[str, str]:
    return {name: fingerprint(torch.cat(windows)) for name, windows in texts.items()}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def _n_steps(texts: dict[str, list[Tensor]], n_models: int, n_blocks: int) -> int:
    """Number of passes of a window through a block or the head that measuring the models takes."""
    return n_models * (n_blocks + 1) * sum(map(len, texts.values()))


def _planned(left: Sequence[_Job], config: StudyConfig, model: BlockwiseModel, walks: KeptWalks) -> int:
    """Number of passes of a window through a block still to come, for estimating the remaining time."""
    pruning: dict[str, int] = {}
    total = 0
    for job in left:
        pruning |= passes(job.cell, _walkers(job, config), walks)
        total += _n_steps(job.texts, _n_models(job, config), model.n_blocks)
    return total + model.n_blocks * sum(pruning.values())


def _walkers(job: _Job, config: StudyConfig) -> list[Participant]:
    if job.cell.config.strategy == "local-only" and is_served(job.cell.config):
        return job.participants[: _n_models(job, config)]
    return job.participants


def _n_models(job: _Job, config: StudyConfig) -> int:
    """Number of the cell's models to measure."""
    alone = job.cell.config.strategy == "local-only"
    return n_alone(job.cell, len(job.participants), config.local_models) if alone else 1


def _check_space(left: Sequence[_Job], model: BlockwiseModel, walks: KeptWalks, out: Path) -> None:
    """Refuse to start if the disk has too little free space."""
    needed: dict[str, int] = {}
    for job in left:
        if is_served(job.cell.config):
            each = walks.bytes_of(job.cell.config)
            needed |= {
                walks.key(participant, job.cell.config): each
                for participant in job.participants
                if not walks.has(participant, job.cell.config)
            }
    n_bytes = sum(needed.values()) + model.checkpoint.n_bytes
    free = free_bytes(out)
    if free < n_bytes:
        raise RunError(
            f"the disk of {out} has {free / 1e9:.1f} GB free, but the study needs up to "
            f"{n_bytes / 1e9:.1f} GB: free some space, choose another disk with --out, or use fewer seeds or "
            "participants"
        )
