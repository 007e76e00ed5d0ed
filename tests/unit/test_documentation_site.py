"""What the documentation site makes from the repository while it is built (`make docs`)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.main import get_command

import fedprllm
from fedprllm.cli.app import app

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "_site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def command_line() -> ModuleType:
    return load("command_line")


@pytest.fixture(scope="module")
def links() -> ModuleType:
    return load("repository_files")


@pytest.fixture(scope="module")
def lists() -> ModuleType:
    return load("lists")


@pytest.fixture(scope="module")
def check_site() -> ModuleType:
    return load("check_site")


def commands(command, path: str = "fedprllm"):
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{path} {name}")


# reference -----------------------------------------------------------------------------------------


def test_every_command_and_option_is_listed(command_line):
    sections = dict(re.findall(r"^## (fedprllm.*?)\n(.*?)(?=^## |\Z)", command_line.reference(), re.M | re.S))
    found = dict(commands(get_command(app)))
    assert set(sections) == set(found)
    for path, command in found.items():
        for option in command.params:
            names = [*option.opts, *option.secondary_opts]
            for word in names if names[0].startswith("-") else [option.metavar or names[0]]:
                row = rf"^\| `.*(?<![\w-]){re.escape(word)}(?![\w-]).*` \|"
                assert re.search(row, sections[path], re.M), (path, word)


def test_an_option_has_its_default_and_its_meaning(command_line):
    text = command_line.reference()
    assert (
        "| `--sparsity <float>` | fraction of the prunable weights to set to zero, in \\[0, 1) | 0.5 |"
        in text
    )
    assert re.search(r"\| `--min-windows <int>` \| fewest windows .* \| 16 \|", text)
    assert "[default" not in text.replace("\\", "")


def test_the_page_of_the_command_line_has_the_place_for_it(command_line):
    page = (ROOT / "docs" / command_line.PAGE).read_text(encoding="utf-8")
    at = SimpleNamespace(file=SimpleNamespace(src_uri=command_line.PAGE))
    assert "## fedprllm federation revoke" in command_line.on_page_markdown(page, page=at)
    other = SimpleNamespace(file=SimpleNamespace(src_uri="guide.md"))
    assert command_line.on_page_markdown(page, page=other) == page


def test_every_public_name_is_on_the_page_of_the_python_interface():
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: fedprllm\.(\w+)$", page, re.M)) == sorted(fedprllm.__all__)


# links ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "place", "link", "expected"),
    [
        ("docs/deployment.md", "deployment.md", "../README.md#use", "project/README.md#use"),
        ("docs/deployment.md", "deployment.md", "method.md#numbers", "method.md#numbers"),
        ("docs/tutorials/a.md", "tutorials/a.md", "../../examples/study.toml", "../examples/study.toml"),
        ("docs/tutorials/a.md", "tutorials/a.md", "../../examples", "../examples/README.md"),
        ("README.md", "project/README.md", "docs/guide.md", "../guide.md"),
        ("README.md", "project/README.md", "docs/decisions/", "../decisions/index.md"),
        ("README.md", "project/README.md", "CONTRIBUTING.md", "CONTRIBUTING.md"),
        ("docs/guide.md", "guide.md", "#prune", "#prune"),
        ("docs/guide.md", "guide.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("docs/guide.md", "guide.md", "../src/fedprllm/api.py", "../src/fedprllm/api.py"),
    ],
)
def test_a_link_leads_to_the_place_on_the_site(links, page, place, link, expected):
    assert links.adapted(f"See [it]({link}).", page, place, links.places()) == f"See [it]({expected})."


@pytest.mark.parametrize("code", ["`[a](../README.md)`", "```\n[a](../README.md)\n```"])
def test_a_link_in_code_stays_as_it_is(links, code):
    assert links.adapted(code, "docs/guide.md", "guide.md", links.places()) == code


def test_every_example_is_on_the_site(links):
    assert {"examples/study.toml", "examples/federation/plan.toml"} <= set(links.places().values())


# lists ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("**Why.**\n* one\n* two", "**Why.**\n\n* one\n* two"),
        ("text\n1. one", "text\n\n1. one"),
        ("it took\n4. of them", "it took\n4. of them"),
        ("* one\n  more", "* one\n    more"),
        ("1. one\n\n   | a |\n\n   end\n2. two", "1. one\n\n    | a |\n\n    end\n\n2. two"),
        ("* a\n  * b\n    c", "* a\n    * b\n        c"),
        ("* a\n\n  ```\n  * b\n  ```", "* a\n\n    ```\n    * b\n    ```"),
        ("text\n```\n* code\n```", "text\n```\n* code\n```"),
        ("text *bold*\nand - so on", "text *bold*\nand - so on"),
        ("* a\n\ntext", "* a\n\ntext"),
    ],
)
def test_lists_are_as_the_site_reads_them(lists, source, expected):
    assert lists.on_page_markdown(source) == expected


# check ---------------------------------------------------------------------------------------------

GOOD = '<h1 id="a">A</h1><p>text</p><a href="other.html#b">b</a><img src="p.svg" alt="p">'


@pytest.fixture
def site(tmp_path) -> Path:
    (tmp_path / "index.html").write_text(GOOD, encoding="utf-8")
    (tmp_path / "other.html").write_text(
        '<h1 id="b">B</h1><a href="https://example.org">x</a>', encoding="utf-8"
    )
    (tmp_path / "p.svg").write_text("<svg/>", encoding="utf-8")
    return tmp_path


def test_a_good_site_has_no_fault(check_site, site):
    assert not list(check_site.faults(site))


@pytest.mark.parametrize(
    ("added", "fault"),
    [
        ('<a href="gone.html">x</a>', "leads nowhere: gone.html"),
        ('<a href="other.html#c">x</a>', "no such anchor: other.html#c"),
        ('<a href="#c">x</a>', "no such anchor: #c"),
        ('<img src="gone.png" alt="x">', "leads nowhere: gone.png"),
        ('<img src="p.svg">', "picture without a text alternative: p.svg"),
        (
            '<script src="https://example.org/a.js"></script>',
            "loads from another host: https://example.org/a.js",
        ),
        ('<script src="//example.org/a.js"></script>', "loads from another host: //example.org/a.js"),
        ('<link rel="stylesheet" href="https://example.org/a.css">', "loads from another host"),
        ('<link rel="preconnect" href="https://example.org">', "loads from another host"),
        ("<p>**Why.**\n* one</p>", "Markdown that was not understood"),
        ('<pre class="mermaid"><code>x</code></pre>', "a mermaid diagram"),
        ("<p>::: fedprllm.prune</p>", "Markdown that was not understood"),
    ],
)
def test_a_fault_is_found(check_site, site, added, fault):
    (site / "index.html").write_text(GOOD + added, encoding="utf-8")
    found = list(check_site.faults(site))
    assert len(found) == 1
    assert found[0].startswith(f"index.html: {fault}")


def test_a_style_sheet_that_loads_from_another_host_is_found(check_site, site):
    (site / "a.css").write_text("@import url('https://example.org/font.css');", encoding="utf-8")
    assert list(check_site.faults(site)) == ["a.css: loads from another host: https://example.org/font.css"]
