"""Pages of reports as tests read them, and runs to report on."""

from __future__ import annotations

import json
import math
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fedprllm import PruneConfig, prune
from fedprllm.files import write_sealed
from fedprllm.report.page import write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}
LINKS = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}


class Page(HTMLParser):
    """The content of a page: tags with their attributes, text, and tables by caption."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._caption, self._cell = "", ""
        self._rows: list[list[str]] = []
        self.feed(self.html)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            self._rows[-1].append(" ".join(self._cell.split()))
        elif tag == "table":
            self.tables[self._caption.strip()] = self._rows

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.texts.append(data)
        if "caption" in self._open:
            self._caption += data
        self._cell += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def verdicts(self) -> list[str]:
        """The sentences that answer a section's question."""
        found = re.findall(r'<p class="verdict">(.*?)</p>', self.html, flags=re.DOTALL)
        return [" ".join(unescape(one).split()) for one in found]

    @property
    def left(self) -> dict[str, str]:
        """What leaves a participant, by question."""
        return dict(self.tables["What leaves a participant, and who sees it"])

    @property
    def headings(self) -> list[str]:
        return re.findall(r"<h2[^>]*>([^<]*)</h2>", self.html)


def report(run: Path) -> Page:
    return Page(write_report(run))


def windows_of(n: int, n_windows: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"site-{number}": torch.randint(
            4, 128, (n_windows, 16), generator=torch.Generator().manual_seed(number)
        )
        for number in range(n)
    }


@pytest.fixture(scope="module")
def run_once(tiny, tmp_path_factory):
    """``run_once(n, **options)`` returns the folder of a run, which is computed once."""
    made: dict[str, Path] = {}

    def get(n: int = 3, architecture: str = "llama", n_windows: int = 2, **options: Any) -> Path:
        key = repr((n, architecture, n_windows, sorted(options.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("runs") / "run"
            prune(tiny(architecture), windows_of(n, n_windows), PruneConfig(**options), out=out)
            made[key] = out
        return made[key]

    return get


@pytest.fixture
def edited(tmp_path):
    """``edited(run, change)`` returns a copy of a run with a changed result."""

    def get(run: Path, change: Any) -> Path:
        out = tmp_path / "edited"
        out.mkdir()
        shutil.copyfile(run / "run.json", out / "run.json")
        result = json.loads((run / "result.json").read_text())
        change(result)
        write_sealed(out / "result.json", result)
        return out

    return get


def measured(**perplexities: float) -> list[dict[str, Any]]:
    return [
        {
            "text": text,
            "perplexity": value if math.isfinite(value) else "inf",
            "nll": math.log(value) if math.isfinite(value) else 800.0,
            "n_tokens": 4321,
            "n_windows": 9,
        }
        for text, value in perplexities.items()
    ]


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())
