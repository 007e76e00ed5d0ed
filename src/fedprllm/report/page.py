"""``write_report``: turn the record of a complete run into a page.

The page is a list of sections, each with a few sentences, tables and figures; the template only lays them
out. A section that does not apply to a run is reduced to one line or omitted.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from fedprllm.api import PruneResult
from fedprllm.errors import RunError
from fedprllm.files import write_text
from fedprllm.healing.in_process import HealResult
from fedprllm.healing.records import is_healing
from fedprllm.pruning.records import Reduction
from fedprllm.pruning.run_folder import Run
from fedprllm.report.facts import (
    Facts,
    Page,
    change,
    count,
    mean_perplexity,
    percent,
    perplexity,
    seconds,
    size,
    size_range,
)
from fedprllm.report.gain import gain
from fedprllm.report.healing import healing_page
from fedprllm.report.perplexity import compared, evaluated
from fedprllm.report.pruning import agreement, ties, time, traffic, zeros
from fedprllm.report.setting import setting
from fedprllm.sharing import SHARING

__all__ = ["write_report"]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write a self-contained HTML page about a complete run.

    The same record always gives the same bytes.

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
    page = healing_page(HealResult.load(run)) if is_healing(run) else _pruning_page(PruneResult.load(run))
    write_text(path, _render(page))
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


def _render(page: Page) -> str:
    template = files("fedprllm.report").joinpath("template.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        title=page.title,
        source="the record of the run (result.json beside this page)",
        summary=page.summary,
        tiles=page.tiles,
        sections=page.sections,
    )


def _pruning_page(result: PruneResult) -> Page:
    facts = Facts(result)
    make = (setting, gain, evaluated, compared, zeros, agreement, ties, traffic, time)
    sections = [section for section in (one(facts) for one in make) if section is not None]
    return Page(f"{facts.model}: pruning report", _summary(facts), _tiles(facts), sections)


# Head ------------------------------------------------------------------------------------------


def _quoted_perplexity(facts: Facts) -> tuple[str, str, str] | None:
    """The perplexity before and after pruning and its change, as text."""
    table, names = facts.pruned_models
    if "dense" not in table or not names:
        return None
    dense = mean_perplexity(table["dense"])
    after = sorted(mean_perplexity(table[name]) for name in names)
    texts = [row.text for row in table["dense"]]
    where = f"on {texts[0]}" if len(texts) == 1 else f"geometric mean over {len(texts)} texts"
    if len(after) == 1:
        return perplexity(dense), perplexity(after[0]), f"{change(after[0], dense)}, {where}"
    return perplexity(dense), f"{perplexity(after[0])} to {perplexity(after[-1])}", where


def _summary(facts: Facts) -> str:
    n = len(facts.participants)
    participants = count(n, "participant")
    how = (
        f"on the pooled text of {participants}"
        if facts.strategy.pools_text
        else f"by {participants}, {facts.config.strategy}"
        if facts.strategy.server_votes
        else f"by {participants}, each alone"
    )
    what = facts.record.outcome.replace("%", " %")
    text = f"{facts.model} was {what} {how}."
    quoted = _quoted_perplexity(facts)
    if quoted:
        text += f" Perplexity: {quoted[0]} dense, {quoted[1]} pruned ({quoted[2].lstrip(', ')})."
    sent = facts.sent.values()
    verb = "sent" if facts.networked else "would send"
    if any(sent):
        text += f" Each participant {verb} {size_range(sent)}: {SHARING[facts.config.share].noun}, no text."
    return text


def _smaller(found: Reduction | None) -> list[tuple[str, str, str]]:
    """How much smaller the model became; nothing if it lost no whole parts."""
    if found is None:
        return []
    files = " → ".join(size(n_bytes) for n_bytes in found.n_bytes)
    note = f"of all {found.n_parameters[0]:,}, {percent(found.of_blocks)} of the blocks'; files {files}"
    return [("fewer parameters", percent(found.of_model), note)]


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """Key figures, each with its name, value and note."""
    tiles = [
        *_smaller(facts.record.reduction),
        (
            "zeros",
            percent(facts.sparsity),
            f"of {facts.record.n_prunable:,} prunable weights",
        ),
        ("participants", f"{len(facts.participants)}", facts.config.strategy),
    ]
    quoted = _quoted_perplexity(facts)
    if quoted:
        tiles.append(("perplexity", f"{quoted[0]} → {quoted[1]}", quoted[2].lstrip(", ")))
    sent = facts.sent.values()
    if any(sent):
        tiles.append(("each sends", size_range(sent), f"in {count(facts.record.rounds, 'round')}"))
    spent = sum(sum(record.seconds.values()) for record in facts.blocks)
    tiles.append(("pruning time", seconds(spent), f"for {count(len(facts.blocks), 'block')}"))
    return tiles
