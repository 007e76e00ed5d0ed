"""The command ``heal``, and how its result is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedprllm.cli.console import noting
from fedprllm.cli.naming import named_texts
from fedprllm.cli.signature import with_options
from fedprllm.config import PruneConfig
from fedprllm.errors import ConfigError
from fedprllm.healing.config import HealConfig

if TYPE_CHECKING:
    from fedprllm.healing.in_process import HealResult

__all__ = ["heal_command", "healing_config", "perplexity_table", "print_healed"]

_SHARED = ("participant", "data", "participants", "partition", "alpha", "eval")
# Options of reading text and computing, which healing has from the pruning before it.
_INHERITED = ("exclude", "window_length", "bos", "dtype", "device", "memory_limit", "seed")


def healing_config(config: PruneConfig, rounds: int, loss: str | None = None) -> HealConfig:
    """The options of healing what a run leaves.

    Args:
        config: The options of the run.
        rounds: Number of rounds.
        loss: What to lower; None for the default.

    Raises:
        ConfigError: The run leaves a model for each participant.
    """
    if config.strategy == "local-only":
        raise ConfigError(
            "--heal heals one model together, and strategy local-only leaves one for each participant: use "
            "another strategy, or heal each model with 'fedprllm heal'"
        )
    inherited = {name: getattr(config, name) for name in _INHERITED}
    return HealConfig(rounds=rounds, **inherited, **({} if loss is None else {"loss": loss}))


def heal_command(
    run_options: Mapping[str, tuple[Any, Any]],
    field_option: Callable[[str, type[HealConfig]], tuple[Any, Any]],
    participants: Callable[[Mapping[str, Any]], Any],
    bars: Any,
    console: Console,
) -> Any:
    """Build the command as a function with a signature that typer can read.

    Args:
        run_options: Options of ``prune`` that are no fields of its configuration.
        field_option: Returns the type and the option for a field of settings.
        participants: Turns the options about text into participants.
        bars: Progress reporting, as in `fedprllm.progress`.
        console: Console to print results on.
    """

    def heal(**given: Any) -> None:
        """Recover what pruning cost: train norms, biases and one scale per row on everybody's text."""
        options = {name: value for name, value in given.items() if value not in (None, [])}
        fields = {name: options.pop(name) for name in list(options) if name in HealConfig.model_fields}
        model, out = _places(options["model"], options.get("out"))
        config = HealConfig(**({"exclude": _left_dense(Path(model).parent)} | fields))
        dense = options.get("dense")
        if config.loss == "dense" and dense is None:
            dense = _pruned_from(Path(model).parent)
        texts = participants(options)
        from fedprllm.healing.in_process import heal as compute

        with noting():
            result = compute(
                model,
                texts,
                config,
                out=out,
                dense=dense,
                eval_texts=named_texts(options.get("eval", ()), "eval"),
                progress=bars,
            )
        print_healed(result, console)

    options: dict[str, tuple[Any, Any]] = {
        "model": (str, typer.Argument(help="folder of a finished run, or a model as for prune")),
        "dense": (
            str | None,
            typer.Option(
                help=escape("model before pruning, for --loss dense [default: the one that RUN pruned]"),
                show_default=False,
            ),
        ),
        **{name: run_options[name] for name in _SHARED},
        "out": (
            Path | None,
            typer.Option(help=escape("folder to write to [default: RUN/healed]"), show_default=False),
        ),
        **{name: field_option(name, HealConfig) for name in HealConfig.model_fields},
    }
    return with_options(heal, options, required=("model",))


def _places(named: str, out: Path | None) -> tuple[str, Path]:
    """The model to heal, and the folder to write to.

    Raises:
        ConfigError: The model is that of no run, and no folder is given.
    """
    run = Path(named).expanduser()
    if (run / "run.json").is_file() or (run / "federation").is_dir():
        if not (run / "model").is_dir():
            raise ConfigError(
                f"{run} has no folder 'model': the run is not complete, or it left one for each participant; "
                "run its command again, or name one of the models"
            )
        return str(run / "model"), out or run / "healed"
    if out is None:
        raise ConfigError("no out: name a folder to write to with --out")
    return named, out


def _left_dense(run: Path) -> tuple[str, ...]:
    """The Linears that a run was told to leave dense: they get no scale. Empty if the folder is no run's."""
    if not (run / "result.json").is_file():
        return ()
    from fedprllm.healing.records import left_dense

    return left_dense(run)


def _pruned_from(run: Path) -> str | None:
    """The model that a run pruned; None if the folder is no run's."""
    if not (run / "result.json").is_file():
        return None
    from fedprllm.healing.records import pruned_from

    return pruned_from(run).source


def print_healed(result: HealResult, console: Console) -> None:
    """Print what healing did and where the model is."""
    record = result.record
    if result.evaluation:
        console.print(perplexity_table(result.evaluation))
    measured = dict(record.held_out)
    if measured:
        console.print(
            f"loss on held-out windows: {measured[0]:.4f} before, [bold]{measured[record.best_round]:.4f}[/] "
            f"after {record.best_round} of {record.config.rounds} rounds"
        )
    console.print(
        f"{record.n_parameters:,} of {record.n_model_parameters:,} parameters trained; each participant "
        f"shared {record.update_bytes / 1e6:,.2f} MB a round"
    )
    for note in record.notes:
        console.print(f"[yellow]note[/]     {escape(note)}", soft_wrap=True)
    console.print(f"healed   {escape(str(result.model_dir))}", soft_wrap=True)


def perplexity_table(evaluation: Mapping[str, Any]) -> Table:
    """Format perplexities as a table with one row per model and one column per text."""
    texts = [row.text for row in next(iter(evaluation.values()))]
    table = Table("model", *(escape(text) for text in texts), title="perplexity (lower is better)")
    for column in table.columns[1:]:
        column.justify = "right"
    for model, rows in evaluation.items():
        table.add_row(model, *(f"{row.perplexity:.2f}" for row in rows))
    return table
