"""Every format is read as what it is, or refused by name with what to do; a document is never quoted."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedprllm.errors import DataError
from fedprllm.text.documents import parts_of, read_documents
from fedprllm.text.sources import Documents
from tests.datasets_like import Rows

SECRET = "sunflower"
CARD = "---\nlicense: mit\nconfigs:\n- config_name: default\n---\n# A data set\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def put(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path | str | object) -> str:
    with pytest.raises(DataError) as refused:
        read_documents(path)
    # The folder of a test is named after its case.
    own = str(path.parent) if isinstance(path, Path) else "\n"
    assert SECRET not in str(refused.value).replace(own, "")
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.ndjson", '{"text": "a"}\n"b"\n', ["a", "b"]),
        ("a.tsv", 'id\ttext\n1\ta, "b"\n2\t"c\td"\n', ['a, "b"', "c\td"]),
        ("a.TXT", "a\n", ["a\n"]),
        ("A.Csv", "text\na\n\nb\n", ["a", "b"]),
        ("a.jsonl.gz", gzip.compress(b'"a"\n"b"', mtime=0), ["a", "b"]),
        ("a.json.bz2", bz2.compress(b'["a", "b"]'), ["a", "b"]),
        ("a.csv.xz", lzma.compress(b"text\na\n"), ["a"]),
        ("a.txt.GZ", gzip.compress(b"\xef\xbb\xbfa\r\nb", mtime=0), ["a\nb"]),
        ("a.gz", gzip.compress(b"a", mtime=0), ["a"]),
        ("notes.2024", "a", ["a"]),
        ("a.py", "x = {}\n", ["x = {}\n"]),
        ("a.txt", 'He said: {"so"}, and left.', ['He said: {"so"}, and left.']),
        ("a.txt", "In one text, a comma.\n", ["In one text, a comma.\n"]),
        ("a.txt", "a\rb\r\nc\r", ["a\rb\nc\r"]),
        ("a.jsonl", '\ufeff"a"\n\ufeff"b"\n', ["a", "b"]),
        ("a.json", '\ufeff["a"]', ["a"]),
        ("README.md", "# Notes\nread me\n", ["# Notes\nread me\n"]),
    ],
)
def test_read_as_what_it_is(tmp_path: Path, name: str, content, expected: list[str]) -> None:
    assert read_documents(put(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    "suffix",
    [
        "zip",
        "tar",
        "tgz",
        "zst",
        "7z",
        "docx",
        "pdf",
        "html",
        "XML",
        "rtf",
        "epub",
        "xlsx",
        "ipynb",
        "pkl",
        "png",
    ],
)
def test_suffixes_refused_by_name(tmp_path: Path, suffix: str) -> None:
    message = refusal(put(tmp_path, f"a.{suffix}", f"{SECRET} in plain letters"))
    assert f"a.{suffix}: .{suffix.lower()} files are not read as text: " in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", f'{{"text": "{SECRET}"}}\n', "found JSON: name it .jsonl"),
        ("a", f'[\n  {{\n "body": "{SECRET}"', "found JSON"),
        ("a.log", f"<!DOCTYPE html><p>{SECRET}", "found a marked-up document"),
        ("a.txt", f"{{\\rtf1 {SECRET}", "found a marked-up document"),
        ("a.txt", f"id,text\n1,{SECRET}\n", "found a table: name it .csv"),
        ("a.dat", f"id\ttext\n1\t{SECRET}\n", "found a table: name it .tsv"),
        ("README.md", CARD, "found the card of a data set"),
        ("a.txt", POINTER, "is a Git LFS pointer: .* git lfs pull"),
        ("a.parquet", POINTER, "is a Git LFS pointer"),
        ("a.jsonl", POINTER, "is a Git LFS pointer"),
        ("a.jsonl.gz", POINTER, "is a Git LFS pointer"),
        ("a.csv", "/annex/objects/SHA256E-s5--1.csv\n", "is a git-annex pointer"),
        ("a.txt", SECRET.encode("utf-16"), "is UTF-16 text: expected UTF-8"),
        ("a.jsonl", b"\xfe\xff" + SECRET.encode("utf-16-be"), "is UTF-16 text"),
        ("a.txt", SECRET.encode("utf-32"), "is UTF-32 text"),
        ("a.txt", SECRET.encode() + b"\xc3", "0xc3 at byte offset 9"),
        ("a.txt", b"a" * 2**18 + b"\xff", "0xff at byte offset 262144"),
        ("a.txt", b"a" * (2**18 - 1) + "\u20ac".encode()[:2] + b"a", "0xe2 at byte offset 262143"),
        ("a.txt", b"a" * 2**18 + b"\0", "NUL byte at byte offset 262144"),
        ("a.txt.gz", SECRET, "cannot be decompressed"),
        ("a.txt.gz", gzip.compress(b"a" * 1000, mtime=0)[:-9], "cannot be decompressed"),
        ("a.txt.xz", SECRET, "cannot be decompressed"),
        ("a.csv", f"id,text\n1,{SECRET}, two, three\n", r"line 2 \(row 1\): expected 2 cells, found 4"),
        ("a.csv", f'text,id\n"{SECRET}\n",1\nx\n', r"line 4 \(row 2\): expected 2 cells, found 1"),
        ("a.csv", f"id;text\n1;{SECRET}\n", "separated by semicolons"),
        ("a.csv", f"id\ttext\n1\t{SECRET}\n", r"separated by tabs: name it \.tsv"),
        ("a.tsv", f"id,text\n1,{SECRET}\n", "separated by commas"),
        ("a.csv", f"text,text\n{SECRET},b\n", "one column 'text', found 2"),
        ("a.csv", f"{SECRET},daisy\nb,c\n", "found 2 others"),
        ("a.csv", f"Text,{SECRET}\nb,c\n", "found Text, 1 others"),
        ("a.csv", "id,text\n", "holds no text"),
        ("a.jsonl", '{"text": null}', 'expected a string as "text", found null'),
        ("a.jsonl", '{"text": 3}', "found a number"),
        ("a.jsonl", f'{{"text": ["{SECRET}"]}}', "found a list"),
        ("a.jsonl", f'{{"text": {{"a": "{SECRET}"}}}}', "found an object with a"),
        ("a.jsonl", "true", "found true or false"),
        ("a.jsonl", f'{{"{SECRET} and more words": 1}}', "an object with 1 others"),
        ("a.json", f'"{SECRET}"', "found a string"),
        ("a.json", "[1.5]", "item 1: expected .* found a number"),
        ("a.jsonl", "1" * 5000, "line 1: not JSON"),
    ],
)
def test_refused(tmp_path: Path, name: str, content, message: str) -> None:
    path = put(tmp_path, name, content)
    found = refusal(path)
    assert str(path) in found
    with pytest.raises(DataError, match=message):
        read_documents(path)


# --- tables


def write_parquet(folder: Path, *columns: tuple[str, pa.Array]) -> Path:
    path = folder / "a.parquet"
    table = pa.Table.from_arrays([array for _, array in columns], names=[name for name, _ in columns])
    parquet.write_table(table, path)
    return path


IDS = ("id", pa.array([SECRET, "y"]))


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_every_type_of_strings(tmp_path: Path, kind: pa.DataType) -> None:
    text = pa.array(["a", None, "b", "a"]).cast(kind)
    assert read_documents(write_parquet(tmp_path, ("text", text))) == ["a", "b", "a"]
    assert read_documents(tmp_path / "a.parquet", keep_blank=True) == ["a", "", "b", "a"]
    assert read_documents(write_parquet(tmp_path, ("body", text), ("n", pa.array([1, 2, 3, 4])))) == [
        "a",
        "b",
        "a",
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [(pa.array([["a"], ["b"]]), "list<"), (pa.array([1, 2]), "int64"), (pa.nulls(2), "null")],
)
def test_the_column_text_wins_or_is_refused_by_type(tmp_path: Path, text: pa.Array, found: str) -> None:
    message = refusal(write_parquet(tmp_path, IDS, ("text", text)))
    assert f"expected strings in the column 'text', found {found}" in message


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    text = pa.array(["a", "b"])
    assert "one column 'text', found 2" in refusal(write_parquet(tmp_path, ("text", text), ("text", text)))
    assert "single column of strings" in refusal(write_parquet(tmp_path, ("body", text), ("body", text)))


def test_a_damaged_parquet_file_is_named_as_damaged(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, ("text", pa.array([f"{number} text" for number in range(3000)])))
    data = path.read_bytes()
    broken = [
        data[:-20],
        data[100:],
        b"",
        b"PAR1",
        data[:4] + b"\xff" * 500 + data[504:],
        data[:-60] + b"\0" * 52 + data[-8:],
    ]
    for content in broken:
        path.write_bytes(content)
        message = refusal(path)
        assert "damaged" in message
        assert "permissions" not in message


def test_parquet_is_read_in_batches(tmp_path: Path) -> None:
    texts = [str(number) for number in range(2500)]
    path = write_parquet(tmp_path, ("text", pa.array(texts)))
    assert read_documents(path) == texts


def test_the_same_rules_for_data_sets() -> None:
    assert read_documents(Rows(id=["x", "y"], text=["a", "b"])) == ["a", "b"]
    assert read_documents(Rows(n=[1], body=["a"])) == ["a"]
    assert read_documents(Rows(text=[str(n) for n in range(2500)])) == [str(n) for n in range(2500)]
    assert "strings in the column 'text', found list" in refusal(Rows(id=["x"], text=[[SECRET]]))
    assert "strings in the column 'text', found int64" in refusal(Rows(id=["x"], text=[3]))
    assert "dataset of 1 rows in memory: expected a column 'text'" in refusal(Rows(a=["x"], b=["y"]))


# --- folders


def test_what_describes_a_data_set_is_left_out_of_its_folder(tmp_path: Path) -> None:
    put(tmp_path, "data/a.jsonl", '"a"\n')
    for name in (
        "README.md",
        "LICENSE",
        "data/LICENSE.txt",
        "dataset_infos.json",
        ".gitattributes",
        "NOTICE",
    ):
        put(tmp_path, name, f'{{"about": "{SECRET}"}}')
    assert read_documents(tmp_path) == ["a"]
    put(tmp_path, "more.txt", "b")
    assert read_documents(tmp_path) == ["a", "b"]


def test_a_card_makes_a_folder_of_prose_a_data_set(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "a")
    put(tmp_path, "LICENSE", "all rights")
    assert read_documents(tmp_path) == ["all rights", "a"]
    put(tmp_path, "README.md", CARD.replace("\n", "\r\n"))
    assert read_documents(tmp_path) == ["a"]


def test_a_folder_with_nothing_but_a_card(tmp_path: Path) -> None:
    put(tmp_path, "README.md", CARD)
    assert "holds no text" in refusal(tmp_path)


def test_a_file_of_another_kind_in_a_folder_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "a")
    put(tmp_path, "b.docx", b"PK\x03\x04")
    assert "b.docx: .docx files are not read as text" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    assert "a pipe or a device" in refusal(tmp_path / "a.txt")
    assert "a pipe or a device" in refusal(tmp_path)


# --- sources that are not files


def test_home_is_expanded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    put(tmp_path, "a.txt", "a")
    assert read_documents("~/a.txt") == ["a"]
    assert read_documents(Path("~/a.txt")) == ["a"]


@pytest.mark.parametrize(
    "text", [f"{SECRET} " * 8, f"{SECRET}\nand more", SECRET * 40, f"{SECRET}/" * 1000, f"{SECRET}\0"]
)
def test_text_given_as_a_path_is_not_quoted(text: str) -> None:
    message = refusal(text)
    assert f"a string of {len(text):,} characters that looks like text itself" in message
    assert "Documents([...])" in message


def test_a_path_of_many_words_is_a_path(tmp_path: Path) -> None:
    path = put(tmp_path, "notes of the first eight wards of our hospital", "a")
    assert read_documents(str(path)) == ["a"]


def test_documents_in_memory() -> None:
    documents = Documents(["a\r\nb", " ", "\ufeffc"])
    assert read_documents(documents) == ["a\nb", "c"]
    assert repr(Documents([SECRET])) == "1 documents in memory"
    assert "1 documents in memory holds no text" in refusal(Documents([" "]))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (SECRET, "found str"),
        ([], "found none"),
        ([SECRET, 3], "item 1: expected a string, found int"),
        ([f"{SECRET}\ud800"], "surrogate pair at character 9"),
        ({"a": SECRET}, "found dict"),
        (5, "found int"),
    ],
)
def test_documents_of_something_else(texts, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        Documents(texts)
    assert SECRET not in str(refused.value)


def test_several_sources_are_read_one_after_the_other(tmp_path: Path) -> None:
    sources = [put(tmp_path, "a.txt", "a"), Documents(["b", "c"]), put(tmp_path, "d.jsonl", json.dumps("d"))]
    assert [part.text for part in parts_of(sources)] == ["a", "b", "c", "d"]
