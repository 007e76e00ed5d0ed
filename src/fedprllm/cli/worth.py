"""The command ``worth-it``. Its options are how to prune, as with ``prune``, and the two texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from fedprllm.cli.console import noting
from fedprllm.cli.signature import with_options
from fedprllm.config import PruneConfig

if TYPE_CHECKING:
    from fedprllm.study.worth import Gain, Worth

__all__ = ["worth_command"]

# A participant alone has no one to share with, and nothing to compare with strategy local-only.
# Models that are compared must lose the same structure.
_LEFT_OUT = ("strategy", "max_update_mb", "block_fraction", "weighting", "aggregation", "smaller")
_NAMES = {
    "dense": "the model as it is",
    "public": "pruned with public text",
    "together": "with public text and yours",
    "own": "with your text alone",
}


def worth_command(option: Callable[[str], tuple[Any, Any]], bars: Any, console: Console) -> Any:
    """Build the command as a function with a signature that typer can read.

    Args:
        option: Returns the type and the option for a field of `PruneConfig`.
        bars: Progress reporting, as in `fedprllm.progress`.
        console: Console to print results on.
    """

    def worth_it(**given: Any) -> None:
        """Learn what your private text adds over public text, before you join. Nothing leaves the machine."""
        method = {name: given[name] for name in PruneConfig.model_fields if given.get(name) not in (None, [])}
        config = PruneConfig(**method)
        from fedprllm.study.worth import worth_it as measure

        with noting():
            found = measure(
                given["model"],
                given["data"],
                given["public"],
                config,
                eval_tokens=given["eval_tokens"],
                progress=bars,
            )
        if given["as_json"]:
            print(json.dumps(asdict(found)))
        else:
            _print(found, console)

    options = _options() | {name: option(name) for name in PruneConfig.model_fields if name not in _LEFT_OUT}
    return with_options(worth_it, options, _REQUIRED, _DEFAULTS)


_REQUIRED = ("model", "data", "public")
_DEFAULTS: Mapping[str, Any] = {"eval_tokens": 16384, "as_json": False}


def _options() -> dict[str, tuple[Any, Any]]:
    return {
        "model": (str, typer.Argument(help="hub id, local folder or GGUF file")),
        "data": (list[str], typer.Option(help="your own text (repeat for several)")),
        "public": (list[str], typer.Option(help="text that anyone has (repeat for several)")),
        "eval_tokens": (int, typer.Option(min=2, help="most tokens of your text to hold out and measure on")),
        "as_json": (bool, typer.Option("--json", help="print JSON")),
    }


def _print(found: Worth, console: Console) -> None:
    table = Table("", "perplexity on your held-out text")
    table.columns[1].justify = "right"
    for name, words in _NAMES.items():
        table.add_row(words, f"{found.perplexity[name]:.2f}")
    console.print(table)
    console.print(
        f"measured on {found.n_tokens:,} tokens; {found.n_windows} calibration windows for each pruned model"
    )
    console.print(_sentence("your text", "public text", found.over_public))
    console.print(_sentence("public text", "your text", found.over_own))


def _sentence(what: str, beside: str, gain: Gain) -> str:
    ends = f"95 % interval {gain.low:+.1%} to {gain.high:+.1%}"
    if not gain.is_clear:
        return f"No difference can be told between {beside} alone and with {what} added: {ends}."
    verb = "lowers" if gain.value > 0 else "raises"
    return f"Adding {what} to {beside} {verb} the perplexity on your text by {abs(gain.value):.1%} ({ends})."
