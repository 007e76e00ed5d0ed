"""Who may import whom, read from the source files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedprllm

ROOT = Path(fedprllm.__file__).parent
# From the bottom up; a module may import from its own layer and those below. A folder counts whole,
# but for the modules that are named apart.
LAYERS = [
    ["errors"],
    ["core", "config", "files", "progress", "documents"],
    ["models", "calibration", "hidden", "wire", "demo_texts"],
    ["participant"],
    ["sharing", "strategies", "runs", "votes", "evaluation", "model_card"],
    ["inputs"],
    ["federation"],
    ["api", "zero_shot"],
    ["demo", "report", "study", "console"],
    ["federation_cli", "participant_cli", "study_cli"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no layer: add it to LAYERS"
    for name in imports(path):
        if name.startswith("fedprllm."):
            other = name.split(".")[1]
            assert LEVEL[other] <= LEVEL[own], f"{own} must not import {name}"


CORE = [path for path in modules() if path.parent.name == "core"]


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_is_pure(path):
    allowed = {
        "__future__",
        "abc",
        "collections",
        "dataclasses",
        "fractions",
        "functools",
        "hashlib",
        "itertools",
        "math",
        "threading",
        "typing",
        "concurrent",
        "numpy",
        "torch",
        "jaxtyping",
        "fedprllm",
    }
    for name in imports(path):
        assert name.split(".")[0] in allowed, f"core/{path.name} imports {name}"
    source = path.read_text()
    for word in ("print(", "open(", "logging", ".cuda(", "time.", 'device="cuda'):
        assert word not in source, f"core/{path.name} uses {word}"


def test_only_one_folder_imports_the_engine():
    users = {
        path.relative_to(ROOT)
        for path in ROOT.rglob("*.py")
        if any(n.split(".")[0] == "nvflare" for n in imports(path))
    }
    assert all(path.parts[:2] == ("federation", "flare") for path in users), users


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from fedprllm.cli import app\n"
        "try: app(['prune', '--help'], standalone_mode=False)\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'nvflare', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--sparsity" in done.stdout


@pytest.mark.parametrize(
    "module",
    ["federation.site", "federation.worker", "federation_cli", "participant_cli"]
    + [
        f"federation.flare.{name}"
        for name in ("executor", "controller", "kits", "processes", "rehearsal", "session", "supervisor")
    ],
)
def test_who_only_carries_bytes_never_imports_torch(module):
    """A participant has two processes of the engine beside its computation; torch is 200 MB in each."""
    if ".flare." in module:
        pytest.importorskip("nvflare")
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, fedprllm.{module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
