"""``write_report``: turn the record of a complete run into a page."""

from __future__ import annotations

from pathlib import Path

from fedprllm.api import PruneResult
from fedprllm.errors import RunError
from fedprllm.files import write_text
from fedprllm.healing.in_process import HealResult
from fedprllm.healing.records import is_healing
from fedprllm.pruning.run_folder import Run
from fedprllm.report.healing import healing_page
from fedprllm.report.layout import render
from fedprllm.report.pruning import pruning_page

__all__ = ["write_report"]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write a self-contained HTML page about a complete run.

    The same run always gives the same bytes.

    Args:
        run: Folder of the run.
        out: HTML file to write; ``report.html`` in the run's folder by default.

    Returns:
        Path of the written file.

    Raises:
        RunError: The folder does not hold a complete run, or ``out`` is a folder.
    """
    run = Path(run)
    path = run / "report.html" if out is None else Path(out)
    _check_complete(run)
    if path.is_dir():
        raise RunError(f"{path} is a folder: expected the name of the HTML file to write")
    if is_healing(run):
        page = healing_page(HealResult.load(run), run)
    else:
        page = pruning_page(PruneResult.load(run), run)
    write_text(path, render(page, "the record of the run (result.json in its folder)"))
    return path


def _check_complete(run: Path) -> None:
    if not (run / "run.json").exists():
        raise RunError(f"{run} contains no run.json: expected the folder that a run was given with --out")
    if not (run / "result.json").exists():
        # Shard names end in the number of shards, which is one more than the number of blocks.
        shards = [*run.glob("**/model*/model-*-of-*.safetensors")]
        n_blocks = f" of {int(shards[0].stem.rsplit('-', 1)[1]) - 1}" if shards else ""
        raise RunError(
            f"the run in {run} is not complete: {Run(run, {}).n_finished}{n_blocks} blocks are finished and "
            "result.json is missing; repeat the run's command to continue it"
        )
