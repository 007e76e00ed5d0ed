"""Which modules may import which, read from the source files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedprllm

ROOT = Path(fedprllm.__file__).parent
# From the bottom up. A room is a folder, or a module outside all folders. A room may import only from the
# floors below it, not from other rooms on its own floor.
FLOORS = [
    ["errors"],
    ["settings", "files", "progress", "process", "lean"],
    ["config"],
    ["core"],
    ["models", "text", "secure"],
    ["sharing", "evaluation", "packing"],
    ["deciding"],
    ["pruning"],
    ["healing"],
    ["api", "federation"],
    ["report", "export"],
    ["study", "demo"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            # ``from package import module`` also imports the module.
            found |= {name for a in node.names if (name := f"{node.module}.{a.name}") in MODULES}
    return found


def module_name(path: Path) -> str:
    return ".".join(("fedprllm", *path.relative_to(ROOT).with_suffix("").parts))


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")


MODULES = {module_name(path): path for path in modules()}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in FLOOR, f"{own} has no floor: add it to FLOORS"
    for name in imports(path):
        if name.startswith("fedprllm.") and (other := name.split(".")[1]) != own:
            assert FLOOR[other] < FLOOR[own], f"{own} must not import {name}"


def test_no_module_imports_itself_through_others():
    arrows = {name: imports(path) & set(MODULES) for name, path in MODULES.items()}
    reachable: dict[str, set[str]] = {}

    def visit(name: str, above: tuple[str, ...]) -> set[str]:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in reachable:
            found = [visit(other, (*above, name)) for other in sorted(arrows[name])]
            reachable[name] = arrows[name].union(*found)
        return reachable[name]

    for name in arrows:
        assert name not in visit(name, ())


def code_of(path: Path) -> str:
    """A module's code without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


CORE = [path for path in modules() if "core" in path.relative_to(ROOT).parts]


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
    source = code_of(path)
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
        "import sys; from fedprllm.cli.app import app\n"
        "try: app(['prune', '--help'], standalone_mode=False)\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'nvflare', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--sparsity" in done.stdout


@pytest.mark.parametrize(
    "module",
    ["federation.site.site", "federation.site.worker", "cli.coordinator", "cli.identity", "cli.participant"]
    + [f"federation.keys.{name}" for name in ("authority", "identity", "revoked")]
    + [
        f"federation.flare.{name}"
        for name in ("executor", "controller", "kits", "processes", "rehearsal", "session", "supervisor")
    ],
)
def test_processes_that_only_pass_bytes_on_never_import_torch(module):
    """A participant runs two engine processes besides its computation; torch would take 200 MB in each."""
    if ".flare." in module:
        pytest.importorskip("nvflare")
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, fedprllm.{module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
