"""Every imported package is declared, and a site installs none that is only needed for plots."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import fedprllm

ROOT = Path(fedprllm.__file__).parent
PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
# The extra that each folder may need; all other code works with the plain installation.
EXTRAS = {
    "report": {"report"},
    "study": {"report"},
    "federation/flare": {"federation"},
    "federation/keys": {"federation"},
    "federation/site/masking": {"federation"},
    "pruning/secure_sums": {"federation"},
    "secure": {"federation"},
    "documents": {"data"},
    "text": {"data"},
    "evaluation/zero_shot": {"lm-eval"},
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", name)[0]).lower()


@pytest.fixture(scope="module")
def distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


@pytest.fixture(scope="module")
def declared() -> dict[str, set[str]]:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: {normal(line) for line in lines} for name, lines in groups.items()}


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    tops = {name.split(".")[0] for name in found}
    return tops - set(sys.stdlib_module_names) - {"fedprllm"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_declared(path, declared, distributions):
    where = path.relative_to(ROOT).with_suffix("").as_posix()
    extras = {extra for folder, needed in EXTRAS.items() if where.startswith(folder) for extra in needed}
    allowed = declared[""].union(*(declared[extra] for extra in extras))
    for module in imported(path):
        names = {normal(name) for name in distributions.get(module, [module])}
        assert names & allowed, f"{where} imports {module}: declare it in pyproject.toml"


def test_a_site_needs_no_plots(declared):
    plain = declared[""] | declared["federation"]
    assert not {"matplotlib", "jinja2", "markupsafe"} & plain


@pytest.mark.parametrize(
    "words",
    [["report", "."], ["demo"], ["study", "m", "--data", "d", "--eval", "e", "--out", "o"]],
    ids=lambda words: words[0],
)
def test_what_draws_says_how_to_install_what_it_needs(words, monkeypatch):
    from importlib import util

    from typer.testing import CliRunner

    from fedprllm import ConfigError
    from fedprllm.cli.app import app

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(ConfigError, match=r"pip install 'fedprllm\[report\]'"):
        CliRunner().invoke(app, words, catch_exceptions=False)
