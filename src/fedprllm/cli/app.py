"""The command line: parses arguments, calls the library and prints results.

The options of ``prune`` are generated from the fields of `PruneConfig`, so that each option, its default and
its help text are defined in one place. Only the commands that compute import torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedprllm.cli.console import (
    Interruption,
    explain,
    interruptible,
    need_plots,
    noting,
    print_sparsity,
    say_interrupted,
)
from fedprllm.cli.coordinator import app as federation_app
from fedprllm.cli.heal import heal_command, healing_config, perplexity_table, print_healed
from fedprllm.cli.identity import app as identity_app
from fedprllm.cli.naming import named_texts
from fedprllm.cli.packing import export_command, pack_command, unpack_command
from fedprllm.cli.participant import ledger, participate
from fedprllm.cli.roster import app as roster_app
from fedprllm.cli.signature import with_options
from fedprllm.cli.study import study_command
from fedprllm.cli.worth import worth_command
from fedprllm.config import PruneConfig
from fedprllm.errors import ConfigError, FedprllmError, RunError, did_you_mean
from fedprllm.lean import start_lean
from fedprllm.process import use_large_pages
from fedprllm.settings import Settings, choices_of, read_toml

if TYPE_CHECKING:
    from fedprllm.healing.config import HealConfig

__all__ = ["main"]

app = typer.Typer(
    name="fedprllm",
    help="Prune one language model together. Texts stay where they are; only small updates are shared.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()
errors = Console(stderr=True)


def _show_version(asked: bool) -> None:
    if asked:
        console.print(f"fedprllm {version('fedprllm')}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Prune one language model together. Texts stay where they are; only small updates are shared."""


# Shown at the end of each command's help.
_EXAMPLES = {
    "prune": "fedprllm prune MODEL --participant north=a.jsonl --participant south=b.txt --out run",
    "heal": "fedprllm heal run --participant north=a.jsonl --participant south=b.txt --rounds 40",
    "evaluate": "fedprllm evaluate run/model --text held-out.txt",
    "report": "fedprllm report run",
    "study": "fedprllm study MODEL --data texts/ --out study",
    "worth-it": "fedprllm worth-it MODEL --data mine.jsonl --public public.txt",
    "export": "fedprllm export run --imatrix run.gguf",
    "pack": "fedprllm pack run/model",
    "unpack": "fedprllm unpack model.fedpack model",
    "participate": "fedprllm participate KIT --data notes/ --model MODEL",
    "ledger": "fedprllm ledger KIT",
    "demo": "fedprllm demo --out demo",
    "identity new": "fedprllm identity new north",
    "identity accept": "fedprllm identity accept north north.kit",
    "identity renew": "fedprllm identity renew north",
    "identity show": "fedprllm identity show north",
    "roster key": "fedprllm roster key north",
    "roster collect": "fedprllm roster collect north.signing south.signing west.signing",
    "roster pin": "fedprllm roster pin north roster.json",
    "roster show": "fedprllm roster show north",
    "federation init": "fedprllm federation init plan.toml",
    "federation sign": "fedprllm federation sign north.csr south.csr",
    "federation renew": "fedprllm federation renew",
    "federation serve": "fedprllm federation serve kits/server",
    "federation run": "fedprllm federation run config.toml",
    "federation stop": "fedprllm federation stop first",
    "federation status": "fedprllm federation status",
    "federation report": "fedprllm federation report first",
    "federation revoke": "fedprllm federation revoke north",
    "federation rehearse": "fedprllm federation rehearse --participants 4",
}


def _example(command: str) -> str:
    return f"Example: {_EXAMPLES[command]}"


# What an interrupted command leaves behind, where it is not nothing.
_CONTINUE = {
    "prune": "the same command continues after the last finished block",
    "demo": "the same command continues after the last finished block",
    "heal": "the same command continues after the last finished round",
    "study": "the same command continues after the last finished cell",
}


def main() -> None:
    """Run the command line. A user's mistake gives one message and exit status 2, Ctrl-C one and 130."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    try:
        with interruptible():
            use_large_pages()
            start_lean()
            app()
    except (FedprllmError, OSError) as error:
        sys.exit(explain(error))
    except Interruption:
        sys.exit(say_interrupted(_CONTINUE.get(command, "")))


@contextmanager
def bars(description: str, total: int) -> Iterator[Any]:
    """Show a progress bar on a terminal, and nothing elsewhere. Yields a function that advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task(description, total=total)
        yield lambda steps: progress.advance(task, steps)


# prune -----------------------------------------------------------------------------------------

_SOURCES = "Participants and text"
_METHOD = "What is pruned, and what is shared"
_DETAILS = "Details of the method"
# Panels of the help, by option; whatever is not listed is a detail.
_PANELS = {
    **dict.fromkeys(("sparsity", "pattern", "structure", "smaller", "share"), _METHOD),
    **dict.fromkeys(("strategy", "criterion", "secure"), _METHOD),
    **dict.fromkeys(("rounds", "round_windows", "learning_rate", "check_every"), "Rounds"),
    **dict.fromkeys(("windows", "window_length", "bos"), "Reading text"),
    **dict.fromkeys(("dtype", "device", "memory_limit", "seed"), "Computation"),
}

_RUN_OPTIONS: dict[str, tuple[Any, Any]] = {
    "model": (
        str | None,
        typer.Argument(help="hub id, local Hugging Face folder or GGUF file", show_default=False),
    ),
    "participant": (
        list[str] | None,
        typer.Option(
            help="text of one participant, PATH or NAME=PATH (repeat for each participant)",
            rich_help_panel=_SOURCES,
        ),
    ),
    "data": (
        list[str] | None,
        typer.Option(
            help="text to divide among --participants instead (repeat for several)", rich_help_panel=_SOURCES
        ),
    ),
    "participants": (
        int | None,
        typer.Option(help="number of participants to divide --data among", rich_help_panel=_SOURCES),
    ),
    "partition": (
        str | None,
        typer.Option(
            help=escape("how to divide --data: iid, file or dirichlet [default: iid]"),
            rich_help_panel=_SOURCES,
        ),
    ),
    "alpha": (
        float | None,
        typer.Option(
            help=escape("concentration of the dirichlet partition [default: 0.5]"), rich_help_panel=_SOURCES
        ),
    ),
    "eval": (
        list[str] | None,
        typer.Option(
            "--eval",
            help="text to evaluate the dense and the pruned model on (repeat for several)",
            rich_help_panel=_SOURCES,
        ),
    ),
    "heal": (
        int | None,
        typer.Option(
            min=1, help="then heal the result on the same text, in this many rounds: OUT/healed/model"
        ),
    ),
    "heal_loss": (
        str | None,
        typer.Option(
            help=escape("what --heal lowers: text or dense, as --loss of fedprllm heal [default: text]"),
            metavar="NAME",
        ),
    ),
    "out": (Path | None, typer.Option(help="folder for the run", show_default=False)),
    "config": (
        Path | None,
        typer.Option(
            help="TOML file with any of these options; the command line takes precedence", show_default=False
        ),
    ),
}


# Command-line types of fields whose own type the command line cannot parse.
_PLAIN = {"window_length": int, "memory_limit": str, "exclude": list[str]}


def _field_option(name: str, settings: type[Settings] = PruneConfig) -> tuple[Any, Any]:
    """Build the option for a field of settings. Unset means the file's value or the field's default."""
    field = settings.model_fields[name]
    annotation = field.annotation
    choices = choices_of(annotation)
    help_text = field.description or ""
    if choices:
        help_text += f": {', '.join(choices)}"
    if field.default not in (None, ()):
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        help_text += f" [default: {default}]"
    plain: Any = str if choices else _PLAIN.get(name, annotation)
    panel = _PANELS.get(name, _DETAILS)
    metavar = "NAME" if choices else None
    flag = "--" + name.replace("_", "-")
    if annotation is bool:
        return bool | None, typer.Option(
            f"{flag}/--no-{flag[2:]}", help=escape(help_text), rich_help_panel=panel
        )
    return plain | None, typer.Option(flag, help=escape(help_text), metavar=metavar, rich_help_panel=panel)


def _prune(**given: Any) -> None:
    """Prune a model for several participants, each with its own text, in this process."""
    options = _read_config(given.pop("config")) | {
        name: value for name, value in given.items() if value not in (None, [])
    }
    fields = {name: options.pop(name) for name in list(options) if name in PruneConfig.model_fields}
    config = PruneConfig(**fields)
    advices = {
        "model": "name a hub id, a folder or a GGUF file as the first argument",
        "out": "name a folder for the run with --out",
    }
    for name, advice in advices.items():
        if name not in options:
            raise ConfigError(f"no {name}: {advice}")
    participants = _participants(options)
    healing = _healing(config, options)

    from fedprllm.api import prune

    with noting():
        result = prune(
            options["model"],
            participants,
            config,
            out=options["out"],
            eval_texts=named_texts(options.get("eval", ()), "eval"),
            progress=bars,
        )
    _print_result(result)
    if healing is not None:
        from fedprllm.healing.in_process import heal

        texts = named_texts(options.get("eval", ()), "eval")
        out = Path(options["out"]) / "healed"
        with noting():
            healed = heal(
                result.model_dir,
                participants,
                healing,
                out=out,
                dense=options["model"] if healing.loss == "dense" else None,
                eval_texts=texts,
                progress=bars,
            )
        print_healed(healed, console)


def _healing(config: PruneConfig, options: Mapping[str, Any]) -> HealConfig | None:
    """The options of healing what the run leaves; None if it is not to be healed."""
    if "heal" in options:
        return healing_config(config, options["heal"], options.get("heal_loss"))
    if "heal_loss" in options:
        raise ConfigError("--heal-loss says what --heal lowers: give --heal N too, or leave it out")
    return None


def _participants(options: Mapping[str, Any]) -> Any:
    dealt = [name for name in ("participants", "partition", "alpha") if name in options]
    if "data" not in options:
        if dealt:
            raise ConfigError(f"--{dealt[0]} needs --data, the text to divide among participants")
        return named_texts(options.get("participant", []), "participant")
    if "participant" in options:
        raise ConfigError("give either --participant or --data, not both")
    if "participants" not in options:
        raise ConfigError("--data needs --participants N, the number of participants to divide it among")
    from fedprllm.pruning.inputs import PooledData

    named = {name: options[name] for name in ("partition", "alpha") if name in options}
    return PooledData(options["data"], options["participants"], **named)


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    values = read_toml(path)
    known = [name for name in _RUN_OPTIONS if name != "config"] + list(PruneConfig.model_fields)
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown option {did_you_mean(name, known)}")
        if name in _FILE_TYPES and not _is_of(value, _FILE_TYPES[name]):
            raise ConfigError(f"{path}: {name} must be {_EXPECTED[_FILE_TYPES[name]]}, found {value!r}")
    return values


# Types of the options that are no fields of `PruneConfig`, in a file.
_FILE_TYPES: dict[str, type] = {
    "model": str,
    "out": str,
    "participant": list,
    "data": list,
    "eval": list,
    "participants": int,
    "partition": str,
    "alpha": float,
    "heal": int,
    "heal_loss": str,
}
_EXPECTED: dict[type, str] = {
    str: "a text in quotation marks",
    list: "a list of paths in square brackets",
    int: "an integer without quotation marks",
    float: "a number without quotation marks",
}


def _is_of(value: object, expected: type) -> bool:
    if expected is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if expected is float else expected)


def _register_prune() -> None:
    options = _RUN_OPTIONS | {name: _field_option(name) for name in PruneConfig.model_fields}
    app.command("prune", epilog=_example("prune"))(with_options(_prune, options))


_register_prune()


def _print_result(result: Any) -> None:
    record = result.record
    if result.evaluation:
        console.print(perplexity_table(result.evaluation))
    if record.choice is not None:
        console.print(f"chosen   {escape(record.choice.sentence)}", soft_wrap=True)
    print_sparsity(record)
    for name, folder in result.model_dirs.items():
        console.print(f"{escape(name):<8} {escape(str(folder))}", soft_wrap=True)
    console.print(f"report   fedprllm report {escape(str(result.out))}", soft_wrap=True)


# evaluate --------------------------------------------------------------------------------------


@app.command("evaluate", epilog=_example("evaluate"))
def _evaluate(
    model: Annotated[str, typer.Argument(help="hub id, local Hugging Face folder or GGUF file")],
    text: Annotated[list[str] | None, typer.Option(help="text to evaluate on (repeat for several)")] = None,
    window_length: Annotated[
        int | None, typer.Option(help=escape("tokens per window [default: 2048, or the model's limit]"))
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="maximum number of tokens per text")] = None,
    bos: Annotated[str, typer.Option(help="beginning-of-sequence token: auto, every, start, never")] = "auto",
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, separated by commas (needs fedprllm[lm-eval])")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="folder with your own lm-eval task files")] = None,
    limit: Annotated[int | None, typer.Option(help="maximum number of examples per lm-eval task")] = None,
    dtype: Annotated[str, typer.Option(help="precision: float32, bfloat16, float16")] = "float32",
    device: Annotated[str, typer.Option(help="device to compute on: cpu, cuda, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Measure perplexity on texts and accuracy on zero-shot tasks."""
    if not text and not tasks:
        raise ConfigError("nothing to evaluate on: give --text PATH or --tasks NAME")
    PruneConfig(bos=bos, dtype=dtype, device=device, window_length=window_length)
    measured: dict[str, Any] = {}
    if text:
        from fedprllm.evaluation.perplexity import evaluate

        with noting():
            rows = evaluate(
                model,
                text,
                window_length=window_length,
                max_tokens=max_tokens,
                bos=bos,  # type: ignore[arg-type]
                dtype=dtype,
                device=device,
                progress=bars,
            )
        measured["perplexity"] = [row.as_json() for row in rows]
    if tasks:
        from fedprllm.evaluation.zero_shot import zero_shot

        measured["tasks"] = zero_shot(
            model, tasks.split(","), task_folder=task_folder, limit=limit, dtype=dtype, device=device
        )
    if as_json:
        print(json.dumps({"model": model, **measured}, indent=1))
        return
    if "perplexity" in measured:
        table = Table("text", "perplexity", "tokens", "windows")
        for row in measured["perplexity"]:
            table.add_row(
                escape(row["text"]),
                f"{float(row['perplexity']):.3f}",
                f"{row['n_tokens']:,}",
                str(row["n_windows"]),
            )
        console.print(table)
    if "tasks" in measured:
        table = Table("task", "metric", "value", "standard error")
        for row in measured["tasks"]:
            table.add_row(row["task"], row["metric"], f"{row['value']:.4f}", f"{row['stderr']:.4f}")
        console.print(table)


# demo ------------------------------------------------------------------------------------------


@app.command("demo", epilog=_example("demo"))
def _demo(
    out: Annotated[Path, typer.Option(help="folder for texts, runs and report")] = Path("demo"),
    sparsity: Annotated[float, typer.Option(help="fraction of the weights set to zero")] = 0.5,
) -> None:
    """Prune a real small model with four participants and compare with the alternatives."""
    PruneConfig(sparsity=sparsity)
    need_plots()
    from fedprllm.demo.compare import demo, demo_sizes, demo_speeds, demo_summary
    from fedprllm.report.page import write_report

    result = demo(out, sparsity, bars)
    comparison = result.record.comparison
    assert comparison is not None, "the demonstration always compares"
    texts = [row.text for row in comparison["dense"]]
    table = Table(
        *("pruned by", *texts, "mean", "MB", "tok/s"),
        title=f"perplexity on held-out text: {sparsity:.0%} zeros by masks and Gram matrices, and a model "
        "with 20% fewer parameters in its blocks",
        caption="MB: size of the files, in which a zero takes as much space as any other number; "
        "tok/s: tokens generated in a second, which zeros do not change",
        pad_edge=False,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    sizes, speeds = demo_sizes(out), demo_speeds(out)
    for name, values in demo_summary(comparison).items():
        style = "bold" if ": together" in name else ""
        cells = (*(f"{value:.2f}" for value in values), sizes.get(name, ""), speeds.get(name, ""))
        table.add_row(name, *cells, style=style)
    console.print(table)
    console.print(f"model    {escape(str(result.model_dir))}", soft_wrap=True)
    console.print(f"report   {escape(str(write_report(result.out)))}", soft_wrap=True)


# report ----------------------------------------------------------------------------------------


@app.command("report", epilog=_example("report"))
def _report(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    out: Annotated[
        Path | None, typer.Option(help=escape("HTML file to write [default: RUN/report.html]"))
    ] = None,
) -> None:
    """Write a self-contained HTML report about a run."""
    if not run.is_dir():
        raise RunError(f"no folder {run}: name the folder that 'fedprllm prune --out' wrote")
    need_plots()
    from fedprllm.report.page import write_report

    console.print(f"report   {escape(str(write_report(run, out)))}", soft_wrap=True)


# study -----------------------------------------------------------------------------------------

app.command("heal", epilog=_example("heal"))(
    heal_command(_RUN_OPTIONS, _field_option, _participants, bars, console)
)
app.command("study", epilog=_example("study"))(study_command(bars, console))
app.command("worth-it", epilog=_example("worth-it"))(worth_command(_field_option, bars, console))


# federation ------------------------------------------------------------------------------------

for _name, _group in {"federation": federation_app, "identity": identity_app, "roster": roster_app}.items():
    for _command in _group.registered_commands:
        _command.epilog = _example(f"{_name} {_command.name}")
    app.add_typer(_group, name=_name)
app.command("export", epilog=_example("export"))(export_command)
app.command("pack", epilog=_example("pack"))(pack_command)
app.command("unpack", epilog=_example("unpack"))(unpack_command)
app.command("participate", epilog=_example("participate"))(participate)
app.command("ledger", epilog=_example("ledger"))(ledger)


if __name__ == "__main__":
    main()
