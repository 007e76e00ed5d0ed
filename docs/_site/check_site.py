"""Read the built site: every link leads somewhere, and nothing is loaded from another host.

python docs/_site/check_site.py site
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes by which a page loads something when it is viewed.
_LOADS = {
    ("script", "src"),
    ("link", "href"),
    ("img", "src"),
    ("img", "srcset"),
    ("iframe", "src"),
    ("source", "src"),
    ("source", "srcset"),
    ("video", "src"),
    ("object", "data"),
    ("embed", "src"),
}
# Links of the head that a browser loads, among those that only say where something is.
_LOADED_LINKS = {
    "stylesheet",
    "icon",
    "preload",
    "preconnect",
    "dns-prefetch",
    "prefetch",
    "modulepreload",
    "manifest",
}
# Marks of lists, code, tables or links in a text: Markdown that the site shows as it is.
_UNREAD = re.compile(r"^\s*([*-] |```|~~~|:::)|\n\s*\d+\.\s|^\|.*\|$|\]\(|<!--", re.MULTILINE)
_VERBATIM = {"code", "pre", "script", "style", "nav"}


class Reader(HTMLParser):
    """What a page has: anchors, links, what it loads, and text that Markdown left over."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.faults: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag loads, links to, or is."""
        given = {name: value or "" for name, value in attrs}
        self._open.append(tag)
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.loads += [given[name] for name in given if (tag, name) in _LOADS and _is_loaded(tag, given)]
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if "mermaid" in given.get("class", "").split():
            self.faults.append("a mermaid diagram, whose script is loaded from another host: draw it as SVG")
        if tag == "img" and not given.get("alt"):
            self.faults.append(f"picture without a text alternative: {given.get('src')}")

    def handle_endtag(self, tag: str) -> None:
        """Forget a tag and what was not closed within it."""
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        """Find Markdown in the text of paragraphs."""
        inside = set(self._open)
        if inside & {"p", "li", "td"} and not inside & _VERBATIM and _UNREAD.search(data):
            self.faults.append(f"Markdown that was not understood: {data.strip()[:70]!r}")


def _is_loaded(tag: str, given: dict[str, str]) -> bool:
    return tag != "link" or bool(_LOADED_LINKS & set(given.get("rel", "").split()))


def faults(site: Path) -> Iterator[str]:
    """All faults of a built site, each in a line."""
    pages = {path.resolve(): Reader(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        found = [*page.faults, *_foreign(page.loads)]
        found += _dead(path, [*page.links, *page.loads], pages, site.resolve())
        yield from (f"{name}: {fault}" for fault in found)
    for sheet in sorted(site.rglob("*.css")):
        urls = re.findall(
            r"(?:url\(\s*|@import\s+(?!url))[\"']?([^\"')\s]+)", sheet.read_text(encoding="utf-8")
        )
        yield from (f"{sheet.relative_to(site)}: {fault}" for fault in _foreign(urls))


def _foreign(targets: list[str]) -> Iterator[str]:
    for target in targets:
        if urlsplit(target).netloc:
            yield f"loads from another host: {target}"


def _dead(path: Path, targets: list[str], pages: dict[Path, Reader], site: Path) -> Iterator[str]:
    for target in targets:
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        # The page of errors is shown at any address, so its links begin at the root.
        base = site if parts.path.startswith("/") else path.parent
        to = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
        to = to / "index.html" if to.is_dir() else to
        if not to.exists():
            yield f"leads nowhere: {target}"
        elif parts.fragment and to in pages and unquote(parts.fragment) not in pages[to].anchors:
            yield f"no such anchor: {target}"


def main() -> None:
    """Check the folder that is named, and end with status 1 if anything is wrong."""
    site = Path(sys.argv[1])
    found = list(faults(site))
    pages = len(list(site.rglob("*.html")))
    if not pages:
        sys.exit(f"{site} holds no pages: build them first (make docs)")
    print(
        "\n".join(found)
        or f"{site}: {pages} pages, every link leads somewhere, nothing is loaded from elsewhere"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
