"""Every command that a page shows exists, with its options, and every configuration is understood."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fedprllm.cli.app import app
from fedprllm.federation.plan import Plan, RunPlan

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
OLD = {ROOT / "CHANGELOG.md"}  # also names what was


def shown(text: str) -> Iterator[str]:
    """Commands in blocks and in a line of text, with continued lines joined."""
    joined = text.replace("\\\n", " ")
    yield from re.findall(r"^(?: {4}|\$ )?(?:\.venv/bin/)?(fedprllm .+)$", joined, re.MULTILINE)
    yield from re.findall(r"`(fedprllm [^`]+)`", joined)


def fault(line: str) -> str | None:
    """What is wrong with a command, if anything is."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return "it cannot be split into words"
    command, words = get_command(app), words[1:]
    while words and getattr(command, "commands", None):
        if words[0].startswith("-"):
            break
        if words[0] not in command.commands:
            return f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
    return f"no option {unknown[0]} of {command.name}" if unknown else None


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OLD], ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    found = {line: fault(line) for line in shown(page.read_text(encoding="utf-8")) if not is_prose(line)}
    assert not {line: words for line, words in found.items() if words}


def is_prose(line: str) -> bool:
    """A name for any command, words that begin with the program's name, or a line of a log."""
    second = line.split()[1]
    return second.isupper() or second == "sent" or not re.fullmatch(r"(--)?[a-z][a-z-]*", second)


def test_commands_are_found_and_faults_too():
    text = "Use `fedprllm roster pin`:\n\n    fedprllm prune M \\\n      --out RUN  # comment\n\n"
    text += "```\nfedprllm heal RUN --rouns 3\n```\n"
    lines = list(shown(text))
    assert [line.split()[1] for line in lines] == ["prune", "heal", "roster"]
    assert [fault(line) for line in lines] == [None, "no option --rouns of heal", None]
    assert fault("fedprllm federation sing a.csr") == "no command sing"
    assert sum(len(list(shown(page.read_text(encoding="utf-8")))) for page in PAGES) > 100


def leaves(command, path: str = "fedprllm") -> Iterator[tuple[str, str]]:
    """Commands that do something, and what their help ends with."""
    if below := getattr(command, "commands", {}):
        for name, one in below.items():
            yield from leaves(one, f"{path} {name}")
    elif not command.hidden:
        yield path, command.epilog or ""


@pytest.mark.parametrize(("path", "epilog"), list(leaves(get_command(app))), ids=lambda value: value[9:30])
def test_every_help_text_ends_with_an_example_that_is_understood(path, epilog):
    example = epilog.removeprefix("Example: ")
    assert f"{example} ".startswith(f"{path} ")
    assert fault(example) is None


def test_no_option_is_cut_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for path, _ in leaves(get_command(app)):
        shown = CliRunner().invoke(app, [*path.split()[1:], "--help"]).stdout
        assert max(map(len, shown.splitlines())) == 80
        assert not [line for line in shown.splitlines() if re.search(r"--\S*…", line)], path


def configurations() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            yield page, block


@pytest.mark.parametrize(
    ("page", "block"), list(configurations()), ids=lambda value: getattr(value, "name", "")
)
def test_files_of_a_federation_are_understood(page, block):
    values = tomllib.loads(block)
    if "participants" in values and "server" in values:
        Plan(**values)
    elif "name" in values and "model" in values:
        RunPlan(**values)
