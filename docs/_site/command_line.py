"""Hook of the documentation site: every command and option, from the command line itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.text import Text
from typer.main import get_command

from fedprllm.cli.app import app

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

PAGE = "reference/command-line.md"
PLACE = "<!-- the site lists every command here -->"
_DEFAULT = re.compile(r" ?\[(?:default: )?(required|(?<=default: )[^\]]+)\]")


def reference() -> str:
    """Markdown with a section for each command and a row for each of its options."""
    program = get_command(app)
    sections = (_section(name, context) for name, context in _commands(program, None, "fedprllm"))
    return "\n\n".join(sections)


def _commands(command: Any, parent: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Names of a command and of those below it, with their contexts; groups without the hidden."""
    context = command.context_class(command, info_name=name, parent=parent)
    yield context.command_path, context
    for below in getattr(command, "commands", {}).values():
        if not below.hidden:
            yield from _commands(below, context, below.name)


def _section(name: str, context: Any) -> str:
    command = context.command
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    parts = [f"## {name}", *_paragraphs(command.help), f"```\n{usage}\n```"]
    shown = [one for one in command.get_params(context) if not getattr(one, "hidden", False)]
    for panel in dict.fromkeys(one.rich_help_panel for one in shown):
        rows = [_row(one, context) for one in shown if one.rich_help_panel == panel]
        parts += [f"**{panel}**"] * bool(panel) + [_table(rows)]
    return "\n\n".join(parts)


def _table(rows: list[tuple[str, str, str]]) -> str:
    """A table of options, with a column of defaults if one of them has any."""
    columns = 3 if any(default for _, _, default in rows) else 2
    table = [("option", "meaning", "default"), ("---",) * 3, *rows]
    return "\n".join(f"| {' | '.join(row[:columns])} |" for row in table)


def _paragraphs(text: str | None) -> list[str]:
    """Paragraphs of a help text. A block of examples, which is indented or marked, keeps its lines."""
    plain = Text.from_markup((text or "").replace("\b", "")).plain
    return [_paragraph(part) for part in re.split(r"\n\s*\n", plain.strip("\n")) if part.strip()]


def _paragraph(part: str) -> str:
    if all(line.startswith((" ", "fedprllm ", "$ ")) for line in part.splitlines() if line):
        return f"```\n{part}\n```"
    return _escaped(" ".join(part.split()))


def _row(option: Any, context: Any) -> tuple[str, str, str]:
    names, help_text = option.get_help_record(context)
    words = " ".join(Text.from_markup(help_text).plain.split())
    found = _DEFAULT.search(words)
    default = found[1] if found else _default(option)
    return f"`{names.replace('|', '/')}`", _escaped(_DEFAULT.sub("", words)), _escaped(default)


def _default(option: Any) -> str:
    """The default of an option whose help text does not name it."""
    if option.required:
        return "required"
    if option.default in (None, False) or not option.show_default:
        return ""
    return "on" if option.default is True else str(option.default)


def _escaped(text: str) -> str:
    """Text in which Markdown and HTML find nothing of theirs."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put the commands into their page."""
    return markdown.replace(PLACE, reference()) if page.file.src_uri == PAGE else markdown
