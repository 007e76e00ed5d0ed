"""What belongs to a release: one version everywhere, and a list of components that is checked."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import fedprllm
from tests import check_sbom

ROOT = check_sbom.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("CITATION.cff", r"^version: (\S+)$"),
        ("CHANGELOG.md", r"^## (\d+\.\d+\.\d+)"),
        ("src/fedprllm/__init__.py", r'^__version__ = "(.+)"$'),
    ],
)
def test_every_file_names_the_same_version(file, pattern):
    found = re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert found[0] == PROJECT["version"]


def test_the_release_has_one_date():
    released = re.search(r"^date-released: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"## {PROJECT['version']} - {released[1]}\n" in (ROOT / "CHANGELOG.md").read_text()


def components(**versions: str) -> dict:
    parts = [{"name": name, "version": "1"} for name in sorted(check_sbom.needed(PROJECT))]
    parts = [part for part in parts if versions.get(part["name"], "1")]
    for part in parts:
        part["version"] = versions.get(part["name"], "1")
    return {
        "metadata": {"component": {"name": "fedprllm", "version": PROJECT["version"]}},
        "components": parts,
    }


def test_a_list_of_components_is_whole_and_as_tested():
    assert {"torch", "nvflare", "huggingface-hub", "matplotlib"} <= check_sbom.needed(PROJECT)
    assert not {"datasets", "pytest"} & check_sbom.needed(PROJECT)
    pinned = {"torch": "2.13.0"}
    assert not check_sbom.faults(components(torch="2.13.0+cpu"), PROJECT, pinned)
    assert check_sbom.faults(components(torch="2.14.0"), PROJECT, pinned) == [
        "torch 2.14.0, but constraints.txt has 2.13.0"
    ]
    assert check_sbom.faults(components(torch=""), PROJECT, pinned) == ["torch is missing"]
    other = components(torch="2.13.0")
    other["metadata"]["component"]["version"] = "0.1.0"
    assert check_sbom.faults(other, PROJECT, pinned) == ["the list is of fedprllm 0.1.0"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("Dockerfile.*")), ids=lambda path: path.suffix
)
def test_an_image_is_made_from_files_that_exist_and_runs_without_rights(path: Path):
    text = path.read_text(encoding="utf-8")
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    (user,) = re.findall(r"^USER (\d+):", text, re.MULTILINE)
    assert int(user) > 0
    assert f"({path.name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert fedprllm.__name__ in re.search(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[1]
