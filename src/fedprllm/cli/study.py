"""The command ``study``. Its options are the fields of `StudyConfig`; lists are separated by commas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedprllm.cli.console import need_plots, noting
from fedprllm.cli.signature import with_options
from fedprllm.settings import read_toml
from fedprllm.study.questions import QUESTIONS, StudyConfig

__all__ = ["study_command"]

_TEXTS = ("data", "domains", "public", "eval")
_NOT_HERE = ("model", "grid")


def study_command(bars: Any, console: Console) -> Any:
    """Build the command as a function with a signature that typer can read.

    Args:
        bars: Progress reporting, as in `fedprllm.progress`.
        console: Console to print results on.
    """

    def study(**given: Any) -> None:
        """Compare variants on one machine: tables, plots and a page that answer the paper's questions."""
        config = StudyConfig(**_from_file(given.pop("config")) | _parsed(given))
        need_plots()
        from fedprllm.study.runner import study as run

        with noting():
            results = run(config, given["out"], bars)
        _print(results, console)
        console.print(f"page     {escape(str(given['out'] / 'report.html'))}", soft_wrap=True)
        tables = escape(str(given["out"] / "results.csv"))
        console.print(f"tables   {tables}, results.json, results.md", soft_wrap=True)

    options: dict[str, tuple[Any, Any]] = {
        "model": (str | None, typer.Argument(help="hub id, local folder or GGUF file", show_default=False)),
        "out": (Path, typer.Option(help="folder for the study; a stopped study continues in its folder")),
        "config": (
            Path | None,
            typer.Option(
                help=escape("TOML file with any of these options and your own [[grid]] tables"),
                show_default=False,
            ),
        ),
    }
    options |= {name: _option(name) for name in StudyConfig.model_fields if name not in _NOT_HERE}
    return with_options(study, options, required=("out",))


def _option(name: str) -> tuple[Any, Any]:
    field = StudyConfig.model_fields[name]
    text = field.description or {"bos": "beginning-of-sequence token", "dtype": "precision"}[name]
    if name in _TEXTS:
        return list[str] | None, typer.Option(help=f"{text} (repeat for several)")
    if name == "questions":
        text += f": {', '.join(QUESTIONS)}"
    elif isinstance(field.default, tuple):
        text += f" [default: {','.join(map(str, field.default))}]"
    else:
        text += f" [default: {field.default}]"
    return str | None, typer.Option(
        help=escape(text), metavar="LIST" if isinstance(field.default, tuple) else None
    )


def _parsed(given: dict[str, Any]) -> dict[str, Any]:
    """Collect the options given on the command line. pydantic converts them to numbers later."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name == "out" or value in (None, []):
            continue
        field = StudyConfig.model_fields[name]
        is_list = isinstance(field.default, tuple) or name == "questions"
        values[name] = value.split(",") if is_list and isinstance(value, str) else value
    return values


def _from_file(path: Path | None) -> dict[str, Any]:
    return {} if path is None else read_toml(path)


def _print(results: Any, console: Console) -> None:
    from fedprllm.study.results import answers, spread_by_text, texts_of

    for question in results.questions:
        cells = results.of(question)
        texts = texts_of(cells)
        title = QUESTIONS[question].title if question in QUESTIONS else question
        table = Table("", *map(escape, texts), title=f"{title}: perplexity")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, row in spread_by_text(cells).items():
            table.add_row(escape(name), *(str(row[text]) if text in row else "" for text in texts))
        console.print(table)
        for sentence in answers(results, question):
            console.print(escape(sentence))
