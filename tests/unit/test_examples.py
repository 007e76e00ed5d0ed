"""The scripts of examples/ do what they say, with the small model and text that comes with Python."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from tests.datasets_like import Rows
from tests.library_text import library_text

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def texts(tmp_path) -> list[str]:
    prose = library_text("prose")
    contents = {
        "north.txt": prose[:6000],
        "south.txt": prose[6000:12000],
        "west.py": library_text("code")[:6000],
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return [str(tmp_path / name) for name in contents]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script as Python runs it, and return what it prints."""

    def get(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return get


def small(windows: int = 2) -> list[str]:
    return ["--windows", str(windows), "--window-length", "32"]


def test_prune_from_python_shows_votes(run, small_model, texts, tmp_path):
    printed = run("prune_from_python.py", small_model, *texts, "--out", tmp_path / "run", *small())
    assert f"the pruned model: {tmp_path / 'run' / 'model'}" in printed
    assert len(re.findall(r"50\.0% zeros; \d+\.\d% of the weights have every vote", printed)) == 3


def test_prune_from_python_takes_data_sets_where_they_are_installed(
    run, small_model, texts, tmp_path, monkeypatch
):
    package = ModuleType("datasets")
    package.__spec__ = ModuleSpec("datasets", None)
    made = []

    class Dataset:
        @staticmethod
        def from_dict(columns: dict[str, list[str]]) -> Rows:
            made.append(Rows(**columns))
            return made[-1]

    package.Dataset = Dataset
    plain = run("prune_from_python.py", small_model, *texts, "--out", tmp_path / "documents", *small())
    monkeypatch.setitem(sys.modules, "datasets", package)
    printed = run("prune_from_python.py", small_model, *texts, "--out", tmp_path / "datasets", *small())
    assert len(made) == len(texts)
    assert printed.splitlines()[1:] == plain.splitlines()[1:]


def test_heal_and_compare_measures_every_model(run, small_model, texts, tmp_path):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(library_text("prose", held_out=True)[:3000], encoding="utf-8")
    short = ["--windows", "16", "--window-length", "64", "--rounds", "20", "--max-tokens", "512"]
    printed = run(
        "heal_and_compare.py", small_model, held_out, *texts, "--out", tmp_path / "comparison", *short
    )
    found = dict(re.findall(r"^(\w.*?) +perplexity +(\d+\.\d\d)$", printed, re.MULTILINE))
    assert list(found) == ["dense", "votes", "Gram matrices", "Gram matrices, healed"]
    assert float(found["dense"]) < float(found["Gram matrices"])
    assert float(found["Gram matrices, healed"]) < float(found["Gram matrices"])


def test_use_the_result_counts_and_writes(run, small_model, texts, tmp_path):
    run("prune_from_python.py", small_model, *texts, "--out", tmp_path / "run", *small())
    printed = run("use_the_result.py", tmp_path / "run" / "model", "The value of", "--new-tokens", "4")
    first, second = printed.splitlines()[:2]
    assert first == "113,280 of 260,032 parameters are zero"
    assert second.startswith("The value of")
    assert len(second) > len("The value of")


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_is_listed_and_names_its_command(script):
    assert f"({script.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    tree = ast.parse(script.read_text(encoding="utf-8"))
    assert f"python examples/{script.name} " in ast.get_docstring(tree)
