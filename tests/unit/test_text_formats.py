"""Every format is read as what it is, or refused by name with what to do; a document is never quoted."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from fedprllm.errors import DataError
from fedprllm.text import decoding, json_values
from fedprllm.text.documents import left_out, parts_of, read_documents
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
        ("a.md", f"<!DOCTYPE html><p>{SECRET}", "found a marked-up document"),
        ("a.txt", f"{{\\rtf1 {SECRET}", "found a marked-up document"),
        ("a.txt", f"id,text\n1,{SECRET}\n", "found a table: name it .csv"),
        ("a", f"id\ttext\n1\t{SECRET}\n", "found a table: name it .tsv"),
        ("README.md", CARD, "found a data set card"),
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


@pytest.mark.parametrize("data", ["a.txt", "a.jsonl", "sub/a.md"])
def test_what_describes_a_folder_is_left_out_and_named(tmp_path: Path, data: str) -> None:
    put(tmp_path, data, '"a"\n' if data.endswith("jsonl") else "a")
    described = (
        "LICENSE LICENSE-MIT LICENSE.txt Licence.md README README_de.md readme.txt README.zh-CN.md COPYING "
    )
    described += (
        "NOTICE NOTICE.txt CHANGELOG.md AUTHORS HISTORY.rst CITATION.cff CITATION.bib dataset_infos.json "
    )
    described += "dataset_info.json dataset_card.md metadata.json SHA256SUMS checksums.txt requirements.txt"
    for name in described.split():
        put(tmp_path, name, f"{SECRET} of its kind\n")
    put(tmp_path, ".gitattributes", "*.jsonl filter=lfs\n")
    assert read_documents(tmp_path) == ["a"]
    (sentence,) = left_out([tmp_path])
    assert sentence.startswith(f"{tmp_path}: ")
    assert "3 more left out" in sentence
    for name in described.split()[-3:]:
        (tmp_path / name).unlink()
    (sentence,) = left_out([str(tmp_path)])
    assert all(f"{name}" in sentence for name in described.split()[:-3])
    assert left_out([tmp_path / data, Documents(["a"])]) == []


@pytest.mark.parametrize("name", ["history.txt", "notice of leave.txt", "security.md", "license-letters.csv"])
def test_a_text_that_may_be_meant_is_read(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, "text\na\n")
    assert read_documents(tmp_path)
    assert left_out([tmp_path]) == []


def test_a_folder_with_nothing_but_a_card(tmp_path: Path) -> None:
    put(tmp_path, "README.md", CARD)
    assert "holds no text but only files that describe some: README.md" in refusal(tmp_path)


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


# --- what is no text at all


@pytest.mark.parametrize(
    "name",
    [
        "a.yaml",
        "a.yml",
        "a.toml",
        "a.ini",
        "a.cfg",
        "a.conf",
        "a.env",
        "a.log",
        "a.bib",
        "a.warc",
        "a.psv",
        "a.srt",
        "a.vtt",
        "a.dat",
        "a.data",
        "a.out",
        "a.lock",
        "a.css",
        "a.YAML",
        "a.Srt",
        "a.log.1",
        "a.toml.gz",
        "a.xyz",
        "a.properties",
        "a.po",
        "a.ics",
        "a.vcf",
        "a.diff",
        "a.jsonc",
        "a.csv.bak",
    ],
)
def test_only_known_suffixes_are_prose(tmp_path: Path, name: str) -> None:
    content = f"{SECRET}: in plain letters\n".encode()
    message = refusal(put(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content))
    assert "is not a supported text format: convert it to plain text (.txt)" in message or (
        "files are not read as text: " in message
    )


@pytest.mark.parametrize("name", ["a.jsonlines", "a.JSONLINES", "a.jsonl.lzma"])
def test_other_names_of_json_lines(tmp_path: Path, name: str) -> None:
    content = b'{"text": "a"}\n"b"\n'
    if name.endswith("lzma"):
        content = lzma.compress(content, format=lzma.FORMAT_ALONE)
    assert read_documents(put(tmp_path, name, content)) == ["a", "b"]


def test_tab_is_tsv(tmp_path: Path) -> None:
    assert read_documents(put(tmp_path, "a.TAB", "id\ttext\n1\ta\n")) == ["a"]


def packed(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", SECRET)
    elif kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"))
    elif kind == "parquet":
        parquet.write_table(pa.table({"text": [SECRET]}), file)
    elif kind == "gzip":
        file.write(gzip.compress(SECRET.encode()))
    elif kind == "bz2":
        file.write(bz2.compress(SECRET.encode()))
    elif kind == "xz":
        file.write(lzma.compress(SECRET.encode()))
    elif kind == "lzma":
        file.write(lzma.compress(SECRET.encode(), format=lzma.FORMAT_ALONE))
    return file.getvalue()


@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl", "a.csv", "a.py"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("zip", "is a ZIP archive"),
        ("tar", "is a tar archive"),
        ("parquet", "is a Parquet file"),
        ("gzip", "is compressed with gzip"),
        ("bz2", "is compressed with bzip2"),
        ("xz", "is compressed with xz"),
        ("lzma", "is compressed with lzma"),
    ],
)
def test_content_tells_what_a_name_does_not(tmp_path: Path, name: str, kind: str, words: str) -> None:
    assert words in refusal(put(tmp_path, name, packed(kind)))


def test_a_compressed_archive_is_an_archive(tmp_path: Path) -> None:
    assert "is a tar archive" in refusal(put(tmp_path, "a.txt.gz", gzip.compress(packed("tar"))))


LONG_LIST = json.dumps([f"{SECRET} number {number}" for number in range(20_000)])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (f'["{SECRET}", "b"]', "JSON"),
        (f'[\n  "{SECRET}"\n]\n', "JSON"),
        ("[1, 2, 3]", "JSON"),
        ("[[1, 2], [3]]", "JSON"),
        ("[]", "JSON"),
        (LONG_LIST, "JSON"),
        (f"id\tbody\n1\t{SECRET}\n2\tb\n", "a table: name it .tsv"),
        (f"{SECRET} one\ttwo words\nand more\tof it\n", "a table: name it .tsv"),
        (f"id,body\n1,{SECRET}\n2,b\n", "a table: name it .csv"),
        (f"id;body\n1;{SECRET}\n", "a table: save it as CSV"),
        (f"WEBVTT\n\n00:01.000 --> 00:02.000\n{SECRET}", "subtitles"),
        (f"1\n00:00:01,000 --> 00:00:02,000\n{SECRET}\n", "subtitles"),
        (f"@article{{{SECRET}2020,\n  title = {{}}\n}}\n", "a bibliography"),
    ],
)
def test_structure_named_txt_is_refused(tmp_path: Path, content: str, found: str) -> None:
    assert f"expected plain text, found {found}" in refusal(put(tmp_path, "a.txt", content))


@pytest.mark.parametrize(
    "content",
    [
        '["Help!", she cried] and ran.',
        "[1] Smith, A. A paper.\n[2] Jones, B. Another.\n",
        "[Verse 1]\nla la\n",
        "{curly} words\n",
        "{}\n",
        "\tAn indented line.\n\tAnother one.\n",
        "One\ttab in a line.\nNone in the next.\n",
        "red,green\nwere the colors, and blue\n",
        "GGUF files hold models.\n",
        "PAR1 is what Parquet begins with.\n",
        "BZhang wrote this.\n",
        "PK is a set of initials.\n",
        '"Hello," she said.\n"Good day."\n',
        "@everyone please read\n",
        "2020-01-01\nA diary.\n",
        "# Title | subtitle\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    ],
)
def test_honest_prose_is_read(tmp_path: Path, content: str) -> None:
    if content == "{}\n":
        content = "{} is an empty set.\n"
    assert read_documents(put(tmp_path, "a.txt", content)) == [content]


@pytest.mark.parametrize("content", ['{"a": 1}\n', '["a", "b"]\n', "id,body\n1,2\n", "<?xml?>\n<?php ?>\n"])
def test_a_program_may_begin_with_anything(tmp_path: Path, content: str) -> None:
    assert read_documents(put(tmp_path, "a.py", content)) == [content]


# --- columns of something else than text


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("id", ["a first sentence of several words", "b"], "named like a column of ids"),
        ("doc_id", ["x", "y"], "named like"),
        ("imageUrl", ["x", "y"], "named like"),
        ("Label", ["good", "bad"], "named like"),
        ("__index_level_0__", ["x", "y"], "named like"),
        ("title", ["The cat sat on the mat", "A dog"], "named like"),
        ("col", ["0123456789abcdef0123", "fedcba98765432100123"], "hashes or ids"),
        ("col", ["123e4567-e89b-12d3-a456-426614174000"] * 3, "hashes or ids"),
        ("content", ["https://example.org/a", "http://example.org/b?c=d"], "URLs"),
        ("col", ["data/a.txt", "data/b c.txt", "/x/y"], "paths"),
        ("content", ["a.txt", "b.txt"], "paths"),
        ("col", ["2020-01-01", "2021-05-05T10:00:00Z"], "numbers or dates"),
        ("col", ["positive", "negative"] * 20, "labels"),
        ("col", ["very good film to see"] * 30 + ["a rather bad film to see"] * 30, "labels"),
        ("col", ["N1", "N2", "N3"], "labels or short strings"),
    ],
)
def test_a_column_of_something_else_is_refused(tmp_path: Path, name: str, values: list, words: str) -> None:
    path = write_parquet(
        tmp_path, (name, pa.array([None, *values])), ("n", pa.array([0, *range(len(values))]))
    )
    message = refusal(path)
    assert words in message
    assert f"found {name}, n. Rename the column that holds the text to 'text'" in message
    assert words in refusal(Rows(**{name: values}, n=[0] * len(values)))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("body", ["a", "b"]),
        ("page_content", ["Short.", "One."]),
        ("col", ["A sentence of a few words.", "Another one that is as long."]),
        ("col", ["\u8fd9\u662f\u4e00\u4e2a\u5f88\u957f\u7684\u53e5\u5b50\u3002\u518d\u89c1"]),
        ("text", ["https://example.org/a", "0123456789abcdef0123"]),
    ],
)
def test_a_column_of_text_is_read(tmp_path: Path, name: str, values: list) -> None:
    assert read_documents(write_parquet(tmp_path, (name, pa.array(values)))) == values


@pytest.mark.parametrize(
    "values", [["https://example.org/a"], ["a/b.txt", "c/d.txt"], ["0123456789abcdef" * 4] * 3, ["1", "2"]]
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_lists_of_something_else_are_refused(tmp_path: Path, values: list, suffix: str) -> None:
    def content(rows: list) -> str:
        return json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))

    assert "found strings that seem to be" in refusal(put(tmp_path, f"a.{suffix}", content(values)))
    named = [{"text": value} for value in values]
    assert read_documents(put(tmp_path, f"a.{suffix}", content(named))) == values


# --- JSON in pieces


@given(
    values=st.lists(
        st.text(max_size=40)
        | st.recursive(st.integers() | st.floats(allow_nan=False) | st.none(), st.lists, max_leaves=5)
        | st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3),
        max_size=8,
    ),
    indent=st.sampled_from([None, 0, 3]),
    size=st.integers(1, 40),
    ascii_only=st.booleans(),
)
def test_a_list_in_pieces_is_the_list(values: list, indent, size: int, ascii_only: bool) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_AT_ONCE", size)
        reader = json_values._Reader([text[n : n + size] for n in range(0, len(text), size)], "a")
        assert reader.peek() == "["
        assert list(reader.items()) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["a"', "Expecting ',' or ']' at character 4"),
        ('["a",]', "Expecting value at character 5"),
        ('["a"] "b"', "Extra data at character 6"),
        ('["a" "b"]', "Expecting ',' or ']' at character 5"),
        ('["a", b]', "Expecting value at character 6"),
        ('["a", "b]', "Unterminated string starting at at character 6"),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_damaged_list_is_named_by_place(
    tmp_path: Path, text: str, message: str, size: int, monkeypatch
) -> None:
    monkeypatch.setattr(json_values, "_AT_ONCE", size)
    monkeypatch.setattr(decoding, "_BLOCK", size)
    assert f"not JSON: {message}" in refusal(put(tmp_path, "a.json", text))


def test_a_long_list_is_not_held_in_memory(tmp_path: Path) -> None:
    document = "The cat sat on the mat and looked at the hill. " * 20
    path = put(tmp_path, "a.json", json.dumps([f"{number} {document}" for number in range(8000)]))
    tracemalloc.start()
    try:
        n_documents = sum(part.starts for part in parts_of([path]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_documents == 8000
    assert path.stat().st_size > 7_500_000 > 2.5 * peak
