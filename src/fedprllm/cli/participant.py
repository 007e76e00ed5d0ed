"""The participant's commands: take part, show what would be sent, and show what was sent.

torch and the engine are imported only by the commands that need them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from fedprllm.cli.console import (
    absolute,
    attend,
    console,
    ending,
    errors,
    holding,
    need_flare,
)
from fedprllm.cli.dry_run import show_dry_run
from fedprllm.cli.identity import warn_of_expiry
from fedprllm.cli.line import StatusLine
from fedprllm.cli.news import Connection, News, Results
from fedprllm.errors import ConfigError
from fedprllm.federation.plan import (
    DEFAULT_ALLOWED,
    DEFAULT_MESSAGE_MB,
    RunPlan,
    SiteSettings,
    read_run_plan,
)

__all__ = ["ledger", "participate"]

_IN_USE = (
    "another 'fedprllm participate' is running with {kit} and fetches results by itself: stop it before you "
    "start this one"
)


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
    require_secure: Annotated[
        bool,
        typer.Option("--require-secure", help="share only under masks, so that the server sees only sums"),
    ] = False,
    max_colluding: Annotated[
        int,
        typer.Option(help="under masks: participants that may conspire with the server", metavar="N", min=0),
    ] = 1,
    min_sum: Annotated[
        int, typer.Option(help="under masks: fewest updates in a sum", metavar="N", min=3)
    ] = 3,
    min_windows: Annotated[int, typer.Option(help="fewest windows an update may be computed from")] = 16,
    min_tokens: Annotated[int, typer.Option(help="fewest tokens an update may be computed from")] = 8192,
    min_participants: Annotated[int, typer.Option(help="fewest participants a run may have")] = 3,
    runs_per_text: Annotated[int, typer.Option(help="number of runs that may use one text")] = 3,
    max_rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="most rounds of healing in a run, each with one gradient")
    ] = 100,
    min_gradient_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="fewest tokens that a gradient may be computed from")
    ] = 256,
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
        int, typer.Option(help="longest message to accept, in MB", metavar="N", min=1)
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
        require_secure=require_secure,
        max_colluding=max_colluding,
        min_sum=min_sum,
        runs_per_text=runs_per_text,
        max_rounds=max_rounds,
        min_gradient_tokens=min_gradient_tokens,
        seed=seed,
        confirm=not yes,
        plan=None if config is None or dry_run else _pinned(read_run_plan(config)),
        max_message_mb=max_message_mb,
    )
    if dry_run:
        show_dry_run(settings, kit, config, blocks)
        return
    need_flare()
    _check_here(settings)
    from fedprllm.federation.flare.configuration import altered_files, engine_folder, participant_name
    from fedprllm.federation.flare.processes import start_participant
    from fedprllm.federation.keys.identity import check_credentials
    from fedprllm.federation.keys.reach import check_host
    from fedprllm.federation.site.site import settings_path
    from fedprllm.files import write_json

    name = participant_name(kit)
    check_host(kit)
    warn_of_expiry("your certificate", check_credentials(kit), f"fedprllm identity renew {kit}")
    for file in altered_files(kit, settings.max_message_mb):
        errors.print(
            f"[yellow]ignored[/]: {escape(str(kit / file))} differs from what is installed here; only the "
            "server's address, the certificates and the key of a kit are used",
            soft_wrap=True,
        )
    if fetch is not None:
        write_json(settings_path(kit), settings.model_dump(mode="json"))
        with ending(), holding(kit, _IN_USE):
            with StatusLine() as line:
                results, connection = Results(kit, fetch), Connection(kit)

                def look() -> bool:
                    line.show(*connection.words())
                    return results()

                attend(lambda: start_participant(kit), f"participant {name}", engine_folder(kit), look)
            results.conclude()
        return
    if settings.confirm and not sys.stdin.isatty():
        raise ConfigError(
            "there is no terminal on which to ask for your consent: pass --yes to agree to every run within "
            "your limits"
        )
    with holding(kit, _IN_USE):
        _take_part(kit, name, settings)


def _take_part(kit: Path, name: str, settings: SiteSettings) -> None:
    from fedprllm.federation.flare.activity import remove_leftovers
    from fedprllm.federation.flare.configuration import engine_folder
    from fedprllm.federation.flare.processes import start_participant
    from fedprllm.federation.site.site import settings_path, work_folder
    from fedprllm.files import write_json

    write_json(settings_path(kit), settings.model_dump(mode="json"))
    remove_leftovers(work_folder(kit))
    results = settings.out or str(kit / "runs")
    for words in (
        f"text      {', '.join(settings.data)}; read here, never sent",
        f"model     {settings.model or 'from the hub, by the id that the coordinator names'}; "
        "compared with the coordinator's before anything is computed",
        f"sent      {', '.join(settings.allow)}; 'fedprllm ledger {kit}' lists every update",
        f"result    {f'built in {results}/RUN/model' if settings.result else 'not wanted'}",
        f"requests  shown here as they arrive; 'fedprllm ledger {kit} --requests' lists them",
    ):
        errors.print(escape(words), soft_wrap=True)
    with ending(), StatusLine() as line:
        attend(lambda: start_participant(kit), f"participant {name}", engine_folder(kit), News(kit, line))


def _pinned(plan: RunPlan) -> dict[str, Any]:
    """The parts of a run that a participant pins."""
    return {
        "model": plan.model,
        "config": plan.config.model_dump(mode="json"),
        "participants": plan.participants,
        "heal": None if plan.healing is None else plan.healing.model_dump(mode="json"),
        "of": plan.of,
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
    model = Path(settings.model)
    if not model.exists():
        _check_name(settings.model)
    if model.is_dir() and not (model / "config.json").exists():
        raise ConfigError(f"{model} is not a model: expected a Hugging Face folder with config.json")


def _check_name(model: str) -> None:
    """Check that what is no path can be a model of the hub.

    Raises:
        ConfigError: It cannot, or the hub may not be asked.
    """
    from fedprllm.models.source import is_cached, is_hub_id, is_offline

    if not is_hub_id(model):
        raise ConfigError(f"there is no model at {model}: name its folder or GGUF file with --model")
    if is_cached(model):
        return
    if is_offline():
        raise ConfigError(
            f"there is no folder or file {model}, and no model of this name has been fetched from the hub, "
            "which HF_HUB_OFFLINE forbids to ask: name the model's folder or GGUF file with --model"
        )
    if "/" not in model:
        errors.print(
            f"[yellow]--model {escape(model)}[/] is no folder or file here: the model of this name will be "
            "fetched from the hub when a run starts; if you mean a folder, correct its name",
            soft_wrap=True,
        )


def ledger(
    kit: Annotated[Path, typer.Argument(help="folder of your kit, or a ledger")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    requests: Annotated[
        bool, typer.Option("--requests", help="show what the coordinator requested, and what was refused")
    ] = False,
    unmasked: Annotated[
        bool, typer.Option("--unmasked", help="under masks: show the sums that you agreed to open")
    ] = False,
) -> None:
    """Show everything that was sent from this kit, everything that was requested, or the sums opened."""
    if requests:
        _show_requests(kit, as_json=as_json)
        return
    if unmasked:
        _show_unmasked(kit, as_json=as_json)
        return
    from fedprllm.federation.site.site import LEDGER, work_folder
    from fedprllm.federation.site.spool import read_ledger

    lines = read_ledger(kit if kit.is_file() else work_folder(kit) / LEDGER)
    if as_json:
        print(json.dumps(lines, indent=1))
        return
    headings = ("time (UTC)", "", "run", "block", "kind", "tensors", "bytes", "sha256")
    table = Table(*headings, box=SIMPLE, show_edge=False, padding=0)  # fits into 80 columns
    sent = [line for line in lines if line.get("direction", "sent") == "sent"]
    for line in lines:
        table.add_row(
            line["time"][:16].replace("T", " "),
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


def _show_unmasked(kit: Path, *, as_json: bool) -> None:
    from fedprllm.federation.site.site import work_folder
    from fedprllm.federation.site.unmask_ledger import UnmaskLedger

    sums = UnmaskLedger(work_folder(kit)).sums()
    if as_json:
        print(json.dumps([one._asdict() for one in sums], indent=1))
        return
    table = Table("model", "text", "sum of", "blocks", "participants", box=SIMPLE)
    for one in sums:
        blocks = f"{one.blocks[0]} to {one.blocks[-1]}" if len(one.blocks) > 1 else str(one.blocks[0])
        names = escape(", ".join(one.participants)) + ("" if one.is_known else " (or fewer: not known)")
        table.add_row(one.model[:8], one.text[:8], one.quantity, blocks, names)
    console.print(table)
