"""What is read as text, how, and what is refused by name."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedprllm.errors import DataError
from fedprllm.text.documents import read_documents
from tests.datasets_like import Rows

# --- text


LONG = "x" * 200_000


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"one\r\ntwo\n", ["one\ntwo\n"]),
        ("a.md", b"\xef\xbb\xbf# title", ["# title"]),
        ("noextension", "é€".encode(), ["é€"]),
        ("a.py", b"x = 1\n", ["x = 1\n"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "a", "id": 1}\n\n"b"\r\n{"text": " "}', ["a", "b"]),
        ("A.JSONL", '{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),
        ("a.json", b'["a", {"text": "b"}, "\\n"]', ["a", "b"]),
        ("a.csv", b'\xef\xbb\xbfid,text\r\n1,"a, ""b""\r\nc"\r\n2,d\r\n', ['a, "b"\nc', "d"]),
        ("long.csv", f"text\n{LONG}\n".encode(), [LONG]),
    ],
)
def test_reads_text(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_documents(tmp_path / name) == expected
    assert read_documents(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b'""\n', "holds no text"),
        ("a.json", b"[]", "holds no text"),
        ("a.csv", b"", "holds no text"),
        ("a.csv", b"text\n", "holds no text"),
        ("a.txt", b"abc\0def", "NUL byte at byte offset 3"),
        ("a.txt", b"ab\xe9f", "0xe9 at byte offset 2"),
        ("a.txt", b"\xef\xbb\xbfab\xe9f", "0xe9 at byte offset 5"),
        ("a.jsonl", b'"a"\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'"a"\n\n{"body": "b"}', r"line 3: expected .* found an object with body"),
        ("a.jsonl", b"3", "line 1: expected a string .* found a number"),
        ("a.jsonl", b'{"text": null}', "line 1: expected"),
        ("a.jsonl", b'"a\\ud800b"', "line 1: .* surrogate pair at character 1"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.json", b'{"text": "a"}', r"expected a list .* found an object with text\. .* name it \.jsonl"),
        ("a.json", b'"a"\n"b"', r"\.jsonl\): not JSON: .* at character 4"),
        ("a.json", b'["a", 3]', "item 2: expected"),
        ("a.csv", b"id,body\n1,a\n", "expected a column 'text' in line 1, found id, body"),
        ("a.csv", b'text\n"never closed\n', "line 2: not CSV"),
        ("a.csv", b"id,text\n1,a\n2\n", r"line 3 \(row 2\): expected 2 cells, found 1"),
        ("a.parquet", b"PAR1 not really", "not a Parquet file"),
    ],
)
def test_refuses_what_is_not_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        read_documents(tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)


def test_csv_limit_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text\n{LONG}\n")
    read_documents(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text(f"body\n{LONG}\n")
    with pytest.raises(DataError, match="column 'text'"):
        read_documents(tmp_path / "b.csv")
    assert csv.field_size_limit() == before


def test_a_csv_without_header_is_not_quoted_at_length(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{'secret ' * 100}\nmore\n")
    with pytest.raises(DataError) as refusal:
        read_documents(tmp_path / "a.csv")
    assert len(str(refusal.value)) < len(str(tmp_path)) + 150


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"id": [1, 2, 3], "text": ["a", None, "b"], "title": ["t", "t", "t"]}, ["a", "b"]),
        ({"id": [1, 2], "body": ["a", "b"]}, ["a", "b"]),
    ],
)
def test_reads_parquet(tmp_path: Path, columns: dict, expected: list[str]) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet") == expected


@pytest.mark.parametrize("columns", [{"a": ["x"], "b": ["y"]}, {"a": [1], "b": [2]}])
def test_parquet_needs_a_text_column(tmp_path: Path, columns: dict) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="found a, b"):
        read_documents(tmp_path / "a.parquet")


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a")
    (tmp_path / ".hidden").write_text("a")
    with pytest.raises(DataError, match=r"'tran\.txt'; did you mean 'train\.txt'"):
        read_documents(tmp_path / "tran.txt")
    with pytest.raises(DataError, match="nowhere does not exist either"):
        read_documents(tmp_path / "nowhere" / "train.txt")
    for number in range(50):
        (tmp_path / f"{number}.bin").write_text("a")
    with pytest.raises(DataError, match=r"did you mean 'train\.txt'. Available: train\.txt\.$"):
        read_documents(tmp_path / "trian.txt")


def test_unreadable_file_and_folder(tmp_path: Path, monkeypatch) -> None:
    def deny(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").write_text("a")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", deny)
        with pytest.raises(DataError, match=r"cannot read .*a\.txt: Permission denied"):
            read_documents(tmp_path / "a.txt")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", deny)
        with pytest.raises(DataError, match="Permission denied"):
            read_documents(tmp_path)


def test_folder_is_read_by_name_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", ".git/x.txt", ".hidden.txt", "a/.hidden.txt", "c.d/e.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "m.jsonl").write_text('"m1"\n"m2"\n')
    (tmp_path / "empty.txt").write_text("")
    assert read_documents(tmp_path) == ["a.txt", "a/z.txt", "b.txt", "c.d/e.txt", "m1", "m2"]


def test_folder_without_text_or_with_a_binary_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        read_documents(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"b\.txt is not text"):
        read_documents(tmp_path)


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "a.parquet"), ("datasets", "hf:org/name:train")])
def test_missing_package_is_named(tmp_path: Path, monkeypatch, package: str, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{package}: pip install fedprllm\[data\]"):
        read_documents(source)


@pytest.fixture
def hub(monkeypatch) -> list:
    """A stand-in for the package ``datasets``; holds the arguments of every call."""
    calls: list = []

    def load_dataset(name, config=None, *, split):
        calls.append((name, config, split))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist")
        return Rows(body=["a", "", "b"], id=[1, 2, 3]) if name == "org/body" else Rows(a=["x"], b=["y"])

    def load_from_disk(path):
        calls.append(path)
        return Rows(text=["a", "b"], title=["t", "t"])

    module = SimpleNamespace(load_dataset=load_dataset, load_from_disk=load_from_disk)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hf:org/body:train", ("org/body", None, "train")),
        ("hf:org/body:en:train[:1%]", ("org/body", "en", "train[:1%]")),
        ("hf:org/body:test[10:20]", ("org/body", None, "test[10:20]")),
    ],
)
def test_hub_dataset(hub: list, source: str, call: tuple) -> None:
    assert read_documents(source) == ["a", "b"]
    assert hub == [call]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:org/name", "unknown dataset 'hf:org/name'.*hf:NAME:SPLIT"),
        ("hf:a:b:c:d", "unknown dataset"),
        ("hf:no/such:train", "hf:no/such:train: Dataset 'no/such' doesn't exist"),
        ("hf:org/two:train", "hf:org/two:train: expected a column 'text' .* found a, b"),
    ],
)
def test_hub_dataset_refused(hub: list, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_documents(source)


def test_saved_dataset(hub: list, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert read_documents(tmp_path) == ["a", "b"]
    assert hub == [str(tmp_path)]


def test_saved_splits_must_be_named(hub: list, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"splits: .*: train"):
        read_documents(tmp_path)


def test_a_dataset_that_datasets_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    datasets.Dataset.from_dict({"text": ["a", None, "b"], "n": [1, 2, 3]}).save_to_disk(tmp_path / "saved")
    assert read_documents(tmp_path / "saved") == ["a", "b"]
