"""A federated run on the coordinator's terminal: its progress, and what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fedprllm.cli.console import console, errors, heed, print_sparsity

if TYPE_CHECKING:
    from fedprllm.pruning.records import RunRecord

__all__ = ["RunDisplay", "print_run"]


class RunDisplay:
    """Progress of a run: a live table on a terminal, and one line per change elsewhere.

    Nothing that should stay is printed while the live table is shown: it is erased when the run has ended.

    Args:
        name: Name of the run.
    """

    def __init__(self, name: str) -> None:
        self._name, self._submitted, self._line = name, False, ""
        self._live = Live(console=errors, refresh_per_second=4, transient=True)

    def __enter__(self) -> RunDisplay:
        if errors.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def if_interrupted(self) -> str:
        """What to tell the user after an interruption."""
        if not self._submitted:
            return "nothing was submitted; the same command starts the run"
        return (
            f"run {self._name} goes on at the server; the same command attaches to it again, and 'fedprllm "
            f"federation stop {self._name}' stops it"
        )

    def tell(self, what: str, details: dict[str, Any]) -> None:
        """Show progress or an event, as `fedprllm.federation.flare.supervisor.supervise` reports them."""
        heed()
        if what == "progress":
            self._show(_progress_table(details), _progress_line(details))
        elif what == "waiting":
            line = f"waiting for {', '.join(details['for'])}"
            self._show(line, line)
        elif what == "results":
            verb = "is" if len(details["waiting"]) == 1 else "are"
            line = f"the model is complete; {', '.join(details['waiting'])} {verb} fetching it"
            self._show(line, line)
        elif what == "run":
            self._name = details["name"]
        elif what == "again":
            errors.print(f"[yellow]retrying[/]: {escape(details['reason'])}", soft_wrap=True)
        else:
            self._submitted = True
            verb = "attached to" if what == "attached" else "submitted"
            errors.print(f"{verb} job {details['job']} of run {escape(self._name)}", soft_wrap=True)

    def _show(self, shown: Table | str, line: str) -> None:
        if errors.is_terminal:
            self._live.update(shown)
        elif line != self._line:
            errors.print(escape(line), soft_wrap=True)
        self._line = line


def _progress_line(status: dict[str, Any]) -> str:
    ready = [participant["n_ready"] for participant in status["participants"].values()]
    steps = _steps(status)
    return f"{status['doing']}: {min(ready, default=0)} of {status['n_blocks']} {steps} computed by everyone"


def _steps(status: dict[str, Any]) -> str:
    """What is counted: blocks, or the rounds of a run that heals."""
    return str(status.get("steps", "blocks"))


def _progress_table(status: dict[str, Any]) -> Table:
    n_blocks, steps = status["n_blocks"], _steps(status)
    table = Table(
        "participant",
        f"{steps} computed",
        "received",
        title=f"{status['doing']} ({status['n_finished']}/{n_blocks} {steps} decided)",
    )
    for name, participant in status["participants"].items():
        received = n_blocks - participant["n_missing"]
        bar = "█" * round(24 * participant["n_ready"] / n_blocks)
        table.add_row(name, f"{bar:<24} {participant['n_ready']}/{n_blocks}", f"{received}/{n_blocks}")
    return table


def _in_words(outcome: dict[str, Any]) -> str:
    """What became of the model at a participant."""
    if not outcome:
        return "not fetched yet"
    return "the same model" if outcome["outcome"] == "received" else f"[red]{outcome['outcome']}[/]"


def _print_left_out(folder: Path) -> None:
    """Name each participant that was left out, and why."""
    path = folder / "federation" / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for event in map(json.loads, lines):
        if event["event"] == "left out":
            console.print(f"[yellow]{event['participant']}[/] was left out: {escape(event['reason'])}")


def _print_evaluation(record: RunRecord) -> None:
    """Perplexities that participants measured on their own held-out text."""
    if not record.evaluation:
        return
    table = Table("held-out text of", "dense", "pruned", "tokens")
    for dense, pruned in zip(record.evaluation["dense"], record.evaluation["model"], strict=True):
        table.add_row(
            dense.text, f"{dense.perplexity:.2f}", f"{pruned.perplexity:.2f}", f"{pruned.n_tokens:,}"
        )
    console.print(table)


def print_run(folder: Path) -> None:
    """Print what a finished run left: its participants, what became of the model, and its figures."""
    from fedprllm.healing.records import is_healing

    if is_healing(folder):
        _print_healing(folder)
    else:
        _print_pruning(folder)


def _print_healing(folder: Path) -> None:
    from fedprllm.cli.heal import print_healed
    from fedprllm.federation.coordinator.results import outcomes
    from fedprllm.healing.in_process import HealResult

    result = HealResult.load(folder)
    models = {name: _in_words(found) for name, found in outcomes(folder).items()}
    table = Table("participant", "rounds", "model")
    for name, participant in result.record.participants.items():
        table.add_row(name, str(participant.n_blocks), models.get(name, "not shared"))
    console.print(table)
    _print_left_out(folder)
    print_healed(result, console)


def _print_pruning(folder: Path) -> None:
    from fedprllm.pruning.records import RunRecord

    record = RunRecord.read(folder / "result.json")
    from fedprllm.federation.coordinator.results import outcomes

    models = {name: _in_words(found) for name, found in outcomes(folder).items()}
    table = Table("participant", "blocks", "tokens", "bytes sent", "model")
    for name, participant in record.participants.items():
        table.add_row(
            name,
            str(participant.n_blocks),
            "in the sum only" if participant.n_windows is None else f"{participant.n_tokens:,}",
            f"{participant.update_bytes:,}",
            models.get(name, "not shared"),
        )
    for name in sorted(set(models) - set(record.participants)):
        table.add_row(name, "[yellow]left out[/]", "", "", models[name])
    console.print(table)
    _print_left_out(folder)
    _print_evaluation(record)
    print_sparsity(record)
    console.print(f"model    {escape(str(folder / 'model'))}", soft_wrap=True)
    console.print(f"report   fedprllm report {escape(str(folder))}", soft_wrap=True)
