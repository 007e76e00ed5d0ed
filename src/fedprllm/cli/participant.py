"""The participant's commands: take part, show what would be sent, and show what was sent.

torch and the engine are imported only by the commands that need them.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from fedprllm.cli.console import absolute, attend, console, ending, errors, need_flare, noting
from fedprllm.cli.identity import warn_of_expiry
from fedprllm.errors import ConfigError, RunError
from fedprllm.federation.plan import (
    DEFAULT_ALLOWED,
    DEFAULT_MESSAGE_MB,
    RunPlan,
    SiteSettings,
    read_run_plan,
)

__all__ = ["ledger", "participate"]


def participate(
    kit: Annotated[Path, typer.Argument(help="folder of your identity")],
    data: Annotated[list[str] | None, typer.Option(help="your text (repeat for several files)")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=escape("local folder or GGUF file of the model [default: the run's hub id]"),
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help=escape("device to compute on: cpu, cuda, ... [default: cpu]"))
    ] = None,
    threads: Annotated[int | None, typer.Option(help="maximum number of CPU threads")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="maximum memory of the computation, in GB")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="memory for hidden states, such as 2GiB; the excess goes to files")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help=escape("kind of update that may be sent (repeat for several) [default: mask]")),
    ] = None,
    block_fraction: Annotated[float, typer.Option(help="largest share of the blocks to prune")] = 1.0,
    record: Annotated[Path | None, typer.Option(help="folder for a copy of every message sent")] = None,
    min_windows: Annotated[int, typer.Option(help="fewest windows an update may be computed from")] = 16,
    min_tokens: Annotated[int, typer.Option(help="fewest tokens an update may be computed from")] = 8192,
    min_participants: Annotated[int, typer.Option(help="fewest participants a run may have")] = 3,
    runs_per_text: Annotated[int, typer.Option(help="number of runs that may use one text")] = 3,
    seed: Annotated[
        int | None,
        typer.Option(
            help=escape("seed for choosing windows [default: drawn once, kept on this machine]"),
            show_default=False,
        ),
    ] = None,
    fetch: Annotated[
        str | None,
        typer.Option(help="name of a finished run: fetch its model, and end", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help=escape("folder for finished models [default: KIT/runs]"))
    ] = None,
    result: Annotated[bool, typer.Option(help="build the pruned model here when a run has ended")] = True,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            help="text of yours that is not in --data: dense and pruned model are measured on it, and the "
            "two perplexities are sent"
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="agree to every run within these limits without being asked")
    ] = False,
    max_message_mb: Annotated[
        int, typer.Option(help="longest message to accept, in MB", min=1)
    ] = DEFAULT_MESSAGE_MB,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="compute and show what would be sent, without connecting")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="the run's TOML file: the only run to accept, or the run to show with --dry-run"),
    ] = None,
    blocks: Annotated[int, typer.Option(help="with --dry-run: number of blocks to show")] = 1,
) -> None:
    """Take part in a federation with your own text, which stays on this machine."""
    if not data and fetch is None:
        raise ConfigError("no text: name a file or folder with --data")
    if fetch is not None and (dry_run or not result):
        raise ConfigError("--fetch builds a model: leave out --dry-run and --no-result")
    settings = SiteSettings(
        data=[absolute(source) for source in data or []],
        model=None if model is None else absolute(model),
        device=device,
        threads=threads,
        memory_gb=memory_gb,
        memory_limit=memory_limit,
        # While only a result is fetched, nothing may be asked of the text.
        allow=[] if fetch is not None else allow or list(DEFAULT_ALLOWED),
        result=result,
        fetch=fetch,
        out=None if out is None else str(out.resolve()),
        held_out=[absolute(source) for source in held_out or []],
        block_fraction=block_fraction,
        record=None if record is None else str(record.resolve()),
        min_windows=min_windows,
        min_tokens=min_tokens,
        min_participants=min_participants,
        runs_per_text=runs_per_text,
        seed=seed,
        confirm=not yes,
        plan=None if config is None or dry_run else _pinned(read_run_plan(config)),
        max_message_mb=max_message_mb,
    )
    if dry_run:
        _dry_run(settings, kit, config, blocks)
        return
    need_flare()
    _check_here(settings)
    from fedprllm.federation.flare.configuration import altered_files, engine_folder, participant_name
    from fedprllm.federation.flare.processes import start_participant
    from fedprllm.federation.keys.identity import check_credentials
    from fedprllm.federation.site.site import settings_path
    from fedprllm.files import write_json

    name = participant_name(kit)
    warn_of_expiry("your certificate", check_credentials(kit), f"fedprllm identity renew {kit}")
    for file in altered_files(kit, settings.max_message_mb):
        errors.print(
            f"[yellow]ignored[/]: {escape(str(kit / file))} differs from what is installed here; only the "
            "server's address, the certificates and the key of a kit are used",
            soft_wrap=True,
        )
    if fetch is not None:
        write_json(settings_path(kit), settings.model_dump(mode="json"))
        with ending(), _holding(kit):
            news = _Results(kit, fetch)
            attend(lambda: start_participant(kit), f"participant {name}", engine_folder(kit), news)
            news.conclude()
        return
    if settings.confirm and not sys.stdin.isatty():
        raise ConfigError(
            "there is no terminal on which to ask for your consent: pass --yes to agree to every run within "
            "your limits"
        )
    with _holding(kit):
        _take_part(kit, name, settings)


def _take_part(kit: Path, name: str, settings: SiteSettings) -> None:
    from fedprllm.federation.flare.configuration import engine_folder
    from fedprllm.federation.flare.processes import start_participant
    from fedprllm.federation.site.site import settings_path
    from fedprllm.files import write_json

    write_json(settings_path(kit), settings.model_dump(mode="json"))
    results = settings.out or str(kit / "runs")
    for line in (
        f"text      {', '.join(settings.data)}; read here, never sent",
        f"model     {settings.model or 'from the hub, by the id that the coordinator names'}; "
        "compared with the coordinator's before anything is computed",
        f"sent      {', '.join(settings.allow)}; 'fedprllm ledger {kit}' lists every update",
        f"result    {f'built in {results}/RUN/model' if settings.result else 'not wanted'}",
        f"requests  shown here as they arrive; 'fedprllm ledger {kit} --requests' lists them",
    ):
        errors.print(escape(line), soft_wrap=True)
    with ending():
        attend(lambda: start_participant(kit), f"participant {name}", engine_folder(kit), _News(kit))


@contextlib.contextmanager
def _holding(kit: Path) -> Iterator[None]:
    """Hold a kit: two processes with one certificate would take each other's place at the server.

    Raises:
        RunError: Another process uses the kit.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(kit / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"another 'fedprllm participate' is running with {kit} and fetches results by itself: stop it "
            "before you start this one"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _pinned(plan: RunPlan) -> dict[str, Any]:
    """The parts of a run that a participant pins."""
    return {
        "model": plan.model,
        "config": plan.config.model_dump(mode="json"),
        "participants": plan.participants,
    }


def _check_here(settings: SiteSettings) -> None:
    """Check that the text and the model exist, before the coordinator starts a run.

    Raises:
        ConfigError: A path does not exist, or is not a model. The message names it.
    """
    for source in settings.data:
        if not source.startswith("hf:") and not Path(source).exists():
            raise ConfigError(f"there is no text at {source}: correct --data")
    if settings.model is None:
        return
    from fedprllm.models.source import is_hub_id

    model = Path(settings.model)
    if not model.exists() and not is_hub_id(settings.model):
        raise ConfigError(f"there is no model at {model}: name its folder or GGUF file with --model")
    if model.is_dir() and not (model / "config.json").exists():
        raise ConfigError(f"{model} is not a model: expected a Hugging Face folder with config.json")


def _dry_run(settings: SiteSettings, kit: Path, config: Path | None, blocks: int) -> None:
    from fedprllm.federation.site.dry_run import dry_run

    if config is None and settings.model is None:
        raise ConfigError("no model: name the run's TOML file with --config, or a model with --model")
    plan = read_run_plan(config) if config else RunPlan(name="dry-run", model=settings.model or "")
    total = n_blocks = 0
    with noting():
        previews = list(dry_run(settings, plan, kit.name or "participant", blocks))
    for preview in previews:
        total, n_blocks = total + preview.message_bytes, preview.n_blocks
        table = Table(
            "tensor",
            "shape",
            "type",
            "bytes",
            title=f"block {preview.block}: {preview.kind}, computed from {preview.n_tokens:,} tokens",
        )
        for tensor in preview.tensors:
            table.add_row(
                escape(tensor.name),
                " x ".join(map(str, tensor.shape)),
                tensor.dtype,
                f"{tensor.payload_bytes:,}",
            )
        console.print(table)
        first = preview.tensors[0]
        console.print(f"first rows of {escape(first.name)} (# prune, . keep):")
        for row in first.rows:
            console.print(f"  {escape(row)}", highlight=False)
        console.print(f"message  {preview.message_bytes:,} bytes; nothing was sent")
    shown = min(blocks, n_blocks)
    console.print(f"all {n_blocks} blocks: about {total * n_blocks // max(shown, 1):,} bytes")


def ledger(
    kit: Annotated[Path, typer.Argument(help="folder of your kit, or a ledger")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    requests: Annotated[
        bool, typer.Option("--requests", help="show what the coordinator requested, and what was refused")
    ] = False,
) -> None:
    """Show everything that was sent from this kit, or everything that was requested."""
    if requests:
        _show_requests(kit, as_json=as_json)
        return
    from fedprllm.federation.site.site import LEDGER, work_folder
    from fedprllm.federation.site.spool import read_ledger

    lines = read_ledger(kit if kit.is_file() else work_folder(kit) / LEDGER)
    if as_json:
        print(json.dumps(lines, indent=1))
        return
    table = Table("time (UTC)", "", "run", "block", "kind", "tensors", "bytes", "sha256", box=SIMPLE)
    sent = [line for line in lines if line.get("direction", "sent") == "sent"]
    for line in lines:
        table.add_row(
            line["time"][:19].replace("T", " "),
            line.get("direction", "sent"),
            line["run"][:8],
            "" if line["block"] is None else str(line["block"]),
            line["kind"],
            str(len(line["shapes"])),
            f"{line['bytes']:,}",
            line["sha256"][:8],
        )
    console.print(table)
    n_received = sum(line["bytes"] for line in lines) - sum(line["bytes"] for line in sent)
    console.print(
        f"sent: {len(sent)} updates, {sum(line['bytes'] for line in sent):,} bytes; received: "
        f"{n_received:,} bytes"
    )


def _show_requests(kit: Path, *, as_json: bool) -> None:
    from fedprllm.federation.flare.request_log import REQUESTS, read_requests, sentence
    from fedprllm.federation.site.site import work_folder

    lines = read_requests(kit if kit.is_file() else work_folder(kit) / REQUESTS)
    if as_json:
        print(json.dumps(lines, indent=1))
        return
    for line in lines:
        console.print(f"{line['time'][:19].replace('T', ' ')}  {escape(sentence(line))}", soft_wrap=True)
    n_refused = sum(line["times"] for line in lines if "refused" in line)
    console.print(f"{sum(line['times'] for line in lines)} requests, {n_refused} of them refused")


class _News:
    """Prints the coordinator's requests and the failures of the participant's own computations."""

    def __init__(self, kit: Path) -> None:
        from fedprllm.federation.flare.request_log import REQUESTS, follow
        from fedprllm.federation.site.site import work_folder

        self._requests = follow(work_folder(kit) / REQUESTS)
        self._complaints = _Watch(kit)
        self._results = _Results(kit)

    def __call__(self) -> None:
        from fedprllm.federation.flare.request_log import sentence

        for line in next(self._requests):
            style = "yellow" if "refused" in line or "reason" in line else "dim"
            errors.print(f"[{style}]{line['time'][11:19]}[/] {escape(sentence(line))}", soft_wrap=True)
        self._complaints()
        self._results()


class _Results:
    """Prints what becomes of results, each state once.

    Args:
        kit: The participant's kit.
        awaited: Name of the run whose result is waited for; its end ends the command.
    """

    def __init__(self, kit: Path, awaited: str | None = None) -> None:
        from fedprllm.federation.site.results import results_folder
        from fedprllm.federation.site.site import work_folder

        self._folder, self._awaited = results_folder(work_folder(kit)), awaited
        self._begin = time.time()
        self._shown = {path: self._state(path) for path in self._folder.glob("*/status.json")}
        if awaited is not None:
            self._shown = {}

    def _state(self, path: Path) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        return {}

    def __call__(self) -> bool:
        """Print what is new; returns whether the awaited result has come to its end."""
        ended = False
        for path in sorted(self._folder.glob("*/status.json")):
            status = self._state(path)
            if not status or (self._awaited is not None and status["run"] != self._awaited):
                continue
            if status["state"] != self._shown.get(path, {}).get("state"):
                self._print(status)
            self._shown[path] = status
            ended |= status["state"] not in ("fetching", "building") and self._is_new(path)
        return self._awaited is not None and (ended or self._is_unknown())

    def _is_new(self, path: Path) -> bool:
        """A model that is there stays; a failure may be of an earlier attempt."""
        return self._state(path)["state"] == "received" or path.stat().st_mtime >= self._begin

    def _is_unknown(self) -> bool:
        path = self._folder / "offers.json"
        if not path.exists() or path.stat().st_mtime < self._begin:
            return False
        return self._awaited not in [offer["name"] for offer in json.loads(path.read_text(encoding="utf-8"))]

    def _print(self, status: dict[str, Any]) -> None:
        name, state = escape(status["run"]), status["state"]
        if state == "received":
            errors.print(
                f"[green]run {name} is complete[/]: {status['sparsity']:.1%} zeros, "
                f"{escape(status['model'])}; every tensor has the coordinator's digest",
                soft_wrap=True,
            )
        elif state in ("fetching", "building"):
            errors.print(f"run {name} is complete: {state} the model", soft_wrap=True)
        elif state != "declined":
            message = escape(status["message"])
            errors.print(f"[red]run {name}[/]: no model ({state}): {message}", soft_wrap=True)

    def conclude(self) -> None:
        """Check that the awaited result is there.

        Raises:
            RunError: It is not. The message says why.
        """
        states = [status for status in self._shown.values() if status.get("run") == self._awaited]
        if any(status["state"] == "received" for status in states):
            return
        if states:
            raise RunError(f"the model of run {self._awaited} was not built ({states[-1]['state']})")
        raise RunError(
            f"the server has no result named {self._awaited} for this participant: the run has not ended, "
            "its name is different, or its plan withholds the result from participants that were left out"
        )


class _Watch:
    """Asks the participant for consent to runs, and prints each failure of its computations once."""

    def __init__(self, kit: Path) -> None:
        from fedprllm.federation.site.site import work_folder

        self._runs = work_folder(kit) / "runs"
        self._shown: set[tuple[str, float]] = set()

    def __call__(self) -> None:
        self._ask()
        self._notes()
        for path in self._runs.glob("*/status.json"):
            with contextlib.suppress(FileNotFoundError):
                key = (path.parent.name, path.stat().st_mtime)
                status = json.loads(path.read_text(encoding="utf-8"))
                if status.get("message") and key not in self._shown:
                    self._shown.add(key)
                    errors.print(f"[red]{status['code']}[/]: {escape(status['message'])}", soft_wrap=True)

    def _notes(self) -> None:
        from fedprllm.files import read_sealed

        for path in self._runs.glob("*/notes.json"):
            with contextlib.suppress(FileNotFoundError, RunError):
                key = (path.parent.name, path.stat().st_mtime)
                if key not in self._shown:
                    self._shown.add(key)
                    for note in read_sealed(path)["notes"]:
                        errors.print(f"note     {escape(note)}", soft_wrap=True)

    def _ask(self) -> None:
        from fedprllm.federation.site.consent import answer, open_questions

        for folder, question in open_questions(self._runs):
            table = Table(title=f"request of run {question['run'][:8]}", show_header=False, box=SIMPLE)
            for name, text in question["lines"]:
                table.add_row(name, escape(text))
            errors.print(table)
            answer(folder, typer.confirm("Take part in this run?", err=True))
