"""The worked examples of CONTRIBUTING.md, applied to a copy of the source and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
_STEP = re.compile(
    r"In `(?P<file>[^`]+)`, above the line `(?P<line>[^`]+)`:\n\n```python\n(?P<code>.*?)```", re.DOTALL
)
_PRUNE = """
import sys
from fedprllm.lean import start_lean
start_lean()
import torch
from fedprllm import PruneConfig, prune
windows = torch.randint(4, 128, (2, 16), generator=torch.Generator().manual_seed(0))
model, out, *runs = sys.argv[1:]
for run in runs:
    config = PruneConfig(**dict(option.split("=") for option in run.split()))
    prune(model, [windows], config, out=f"{out}/{run}")
"""


def steps(heading: str) -> list[re.Match[str]]:
    """The steps of a section, in order."""
    sections = re.split(r"^## ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [text for text in sections if text.startswith(heading)]
    found = list(_STEP.finditer(section))
    assert len(found) == section.count("above the line"), "a step that cannot be read"
    return found


def changed_copy(folder: Path, heading: str) -> Path:
    """A copy of source and tests with the steps of a section applied."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for step in steps(heading):
        path = folder / step["file"]
        text = path.read_text(encoding="utf-8")
        place = f"\n{step['line']}\n"
        assert text.count(place) == 1, f"{step['file']} has no single line {step['line']!r}"
        path.write_text(text.replace(place, f"\n{step['code']}{place[1:]}"), encoding="utf-8")
    return folder


def python(copy: Path, *words: object) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy}"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def pruned(tmp_path, tiny):
    def weights(out: Path) -> dict:
        files = sorted((out / "model").glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def run(copy: Path, *runs: str) -> list[dict]:
        """The weights of runs with these options."""
        python(copy, "-c", _PRUNE, tiny("llama"), tmp_path, *runs)
        return [weights(tmp_path / run) for run in runs]

    return run


def test_a_criterion_is_a_function_a_row_and_a_name(tmp_path, pruned):
    copy = changed_copy(tmp_path / "copy", "Add a criterion")
    tests = ["tests/oracles/test_criteria_oracle.py", "tests/contracts/test_tables.py"]
    python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "energy or oracle or row")
    weights, other = pruned(copy, "criterion=energy", "criterion=wanda")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (weights[name] == 0).sum() == weights[name].numel() // 2
    # The square of a weight weighs it more against the norm of its input.
    assert not ((weights[name] == 0) == (other[name] == 0)).all()


def test_a_decision_is_a_function_and_a_row(tmp_path, pruned):
    copy = changed_copy(tmp_path / "copy", "Add a way to decide")
    ours, theirs = pruned(
        copy, "share=gram solver=diagonal strategy=iterative", "share=statistics strategy=iterative"
    )
    for name, weight in theirs.items():
        assert (ours[name] == weight).all(), name
