"""The scripts of examples/ do what they say, with the small model and text that comes with Python."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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


@pytest.fixture
def in_checkout(tmp_path, monkeypatch):
    """A folder that reads like the checkout and may be written to; one thread, for tests run side by side."""
    for name in ("docs", "tests"):
        (tmp_path / name).symlink_to(EXAMPLES.parent / name)
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_shows(notebook, in_checkout, monkeypatch, capsys):
    monkeypatch.chdir(in_checkout / "examples")
    names: dict[str, Any] = {}
    for cell in code_cells(notebook):
        exec(compile("".join(cell["source"]), notebook.name, "exec"), names)
        if names.get("figure"):
            names["plt"].close(names.pop("figure"))
        stored = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        # Perplexities and votes follow Python's texts; what is printed about them does not.
        assert without_numbers(capsys.readouterr().out) == without_numbers(stored)
    perplexity = names["perplexity"]
    for kind in names["held_out"]:
        alone = {name: perplexity[f"alone: {name}"][kind] for name in names["texts"]}
        assert perplexity["together: Gram"][kind] < min(alone.values())


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def without_numbers(text: str) -> str:
    return re.sub(r" *[\d.,]+", "#", text)


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_listed_and_names_no_machine(notebook):
    assert f"({notebook.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/|\\\\Users", json.dumps(outputs))


def test_the_readme_s_python_runs(in_checkout, capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", (EXAMPLES.parent / "README.md").read_text(), re.M | re.S)
    exec(compile(block, "README.md", "exec"), {})
    folder, *votes, perplexity = capsys.readouterr().out.splitlines()
    assert (in_checkout / folder / "config.json").exists()
    assert "".join(votes).startswith("tensor([[")
    assert float(perplexity) > 1
