"""Hook of the documentation site: pages and files of the repository that lie outside docs/.

The pages link to each other by their places in the repository, so that links work on a code host and in an
editor. The site shows some of these files at other places; this hook adds them and adapts the links.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
FILES = ("CITATION.cff",)
HIDDEN = ("notes.md",)  # part of another page
# Folders of docs/ that pages link to, with title and first paragraph of the list that stands for each.
FOLDERS = {
    "decisions": (
        "Decisions",
        "One page for every format, interface and dependency: the decision, its reasons, what was rejected.",
    ),
    "benchmarks": ("Measured values", "What [Benchmarks](../benchmarks.md) shows as tables and plots."),
}
# A fenced block or code in backticks, which stay as they are, or the target of a link.
_LINK = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`|(?P<before>\]\()(?P<target>[^)\s]+)", re.M | re.S)


def places(root: Path = ROOT) -> dict[str, str]:
    """Where the site shows what the repository has outside docs/, both as POSIX paths."""
    examples = sorted((root / "examples").rglob("*"))
    shown = [path.relative_to(root).as_posix() for path in examples if _is_shown(path)]
    return {name: f"project/{name}" for name in (*PAGES, *FILES)} | {name: name for name in shown}


def _is_shown(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def adapted(markdown: str, in_repository: str, on_site: str, moved: dict[str, str]) -> str:
    """The text of a page with its links adapted to the site.

    Args:
        markdown: Text of the page.
        in_repository: Path of the page in the repository.
        on_site: Path of the page among the site's sources.
        moved: Places of files outside docs/, by their paths in the repository.
    """
    folder, site_folder = posixpath.dirname(in_repository), posixpath.dirname(on_site)

    def replace(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_sign, anchor = target.partition("#")
        shown = _shown(posixpath.normpath(posixpath.join(folder, path)), moved)
        if shown is None:
            return match[0]  # mkdocs warns of it, and warnings are errors
        return f"{match['before']}{posixpath.relpath(shown, site_folder or '.')}{hash_sign}{anchor}"

    return _LINK.sub(replace, markdown)


def _shown(path: str, moved: dict[str, str]) -> str | None:
    """Where a path of the repository is on the site; a folder stands for the list of its pages."""
    if path.removeprefix("docs/") in FOLDERS:
        path = f"{path}/index.md"
    if (ROOT / path / "README.md").is_file():
        path = f"{path}/README.md"
    return moved.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ to the site's sources."""
    from mkdocs.structure.files import File

    for path, place in places().items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    for folder in FOLDERS:
        files.append(File.generated(config, f"{folder}/index.md", content=_listing(folder)))
    return files


def _listing(folder: str) -> str:
    title, paragraph = FOLDERS[folder]
    paths = sorted((ROOT / "docs" / folder).iterdir())
    items = [f"* [{_title(path)}]({path.name})" for path in paths if path.name not in HIDDEN]
    return "\n".join([f"# {title}", "", paragraph, "", *items, ""])


def _title(path: Path) -> str:
    if path.suffix != ".md":
        return path.name
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").removeprefix("Decision: ")


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Adapt the links of a page."""
    moved = places()
    back = {place: path for path, place in moved.items()}
    on_site = page.file.src_uri
    return adapted(markdown, back.get(on_site, f"docs/{on_site}"), on_site, moved)
