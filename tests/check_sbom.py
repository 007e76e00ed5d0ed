"""Compare the list of components (`make sbom`) with what the package says that it needs.

python tests/check_sbom.py DIST
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("federation", "report")


def needed(project: dict[str, Any]) -> set[str]:
    """Names of everything that the package needs directly, with the extras that are listed."""
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    return {normal(re.split(r"[<>=!~\[; ]", line)[0]) for line in lines}


def normal(name: str) -> str:
    """The name of a package as all tools spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def faults(listed: dict[str, Any], project: dict[str, Any], pinned: dict[str, str]) -> list[str]:
    """What is missing from a list, or has another version than the one it was tested with."""
    found = {normal(part["name"]): str(part.get("version")) for part in listed["components"]}
    subject = listed["metadata"]["component"]
    wrong = [f"{name} is missing" for name in sorted(needed(project) - found.keys())]
    if (subject["name"], subject.get("version")) != (project["name"], project["version"]):
        wrong.append(f"the list is of {subject['name']} {subject.get('version')}")
    for name, version in found.items():
        if name in pinned and version.split("+")[0] != pinned[name]:
            wrong.append(f"{name} {version}, but constraints.txt has {pinned[name]}")
    return wrong


def main() -> None:
    """Check the list in a folder, and end with status 1 if anything is wrong."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {normal(name): version for name, _, version in (line.partition("==") for line in lines)}
    path = Path(sys.argv[1]) / f"{project['name']}.cdx.json"
    listed = json.loads(path.read_text(encoding="utf-8"))
    wrong = faults(listed, project, pinned)
    print("\n".join(wrong) or f"{path}: {len(listed['components'])} components")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
