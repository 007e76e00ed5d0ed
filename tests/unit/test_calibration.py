"""Text to token windows, and windows to participants."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedprllm.errors import ConfigError, DataError
from fedprllm.text.documents import read_documents
from fedprllm.text.partition import partition
from fedprllm.text.windows import (
    adds_bos,
    evaluation_windows,
    fingerprint,
    token_windows,
)
from tests.library_text import library_text

SENTENCES = [
    "the cat sat on the mat",
    "a dog ran over the hill\n\nand the cat saw it",
    "nothing  else  moved\n",
]
BOS = 0


def make_tokenizer(*, bos: bool = True, adds: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose limit of 8 tokens every text here exceeds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=8, bos_token="<s>" if bos else None
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


class Recorder:
    """A tokenizer that keeps the texts it was given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.bos_token_id, self.texts = tokenizer, tokenizer.bos_token_id, []

    def __call__(self, text, **options):
        self.texts.append(text)
        return self.tokenizer(text, **options)


def encode(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Three documents in two files."""
    (tmp_path / "one.txt").write_text(SENTENCES[0])
    (tmp_path / "two.json").write_text(json.dumps(SENTENCES[1:]))
    return [tmp_path / "one.txt", tmp_path / "two.json"]


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
        ("a.csv", b"id,body\n1,a\n", "expected a column 'text', found id, body"),
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
    def deny(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").write_text("a")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", deny)
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
    (tmp_path / "b.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"b\.bin is not text"):
        read_documents(tmp_path)


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "a.parquet"), ("datasets", "hf:org/name:train")])
def test_missing_package_is_named(tmp_path: Path, monkeypatch, package: str, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{package}: pip install fedprllm\[data\]"):
        read_documents(source)


class Rows(dict):
    """What is used of a ``datasets.Dataset``."""

    @property
    def features(self) -> dict:
        kinds = {str: "string", int: "int64"}
        return {name: SimpleNamespace(dtype=kinds[type(rows[0])]) for name, rows in self.items()}


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


# --- windows


def test_all_windows_are_the_joined_text_cut(tokenizer, sources) -> None:
    windows = token_windows(sources, tokenizer, n_windows=0, window_length=4, seed=0, bos="never")
    ids = encode(tokenizer, "\n\n".join(SENTENCES))
    assert len(ids) % 4 != 0
    assert windows.dtype == torch.int64
    assert torch.equal(windows, ids[: len(ids) // 4 * 4].view(-1, 4))


def test_tokenizing_a_long_text_gives_no_warning(sources) -> None:
    fresh = make_tokenizer()
    token_windows(sources, fresh, n_windows=0, window_length=4, seed=0, bos="never")
    evaluation_windows(sources, fresh, window_length=4, bos="never")
    assert not fresh.deprecation_warnings


def test_windows_come_from_documents_in_seeded_order(tokenizer, tmp_path: Path) -> None:
    documents = [f"document {number} says {number * 7919}" for number in range(200)]
    (tmp_path / "a.json").write_text(json.dumps(documents))
    seen = {}
    for seed in (0, 1):
        recorder = Recorder(tokenizer)
        arguments = {"n_windows": 5, "window_length": 16, "seed": seed, "bos": "never"}
        windows = token_windows([tmp_path / "a.json"], recorder, **arguments)
        again = token_windows([tmp_path / "a.json"], tokenizer, **arguments)
        assert windows.shape == (5, 16)
        assert torch.equal(windows, again)
        text = recorder.texts[-1]
        visited = text.split("\n\n")
        assert len(set(visited)) == len(visited) < 200
        assert set(visited) <= set(documents)
        assert visited != [document for document in documents if document in visited]
        rows = encode(tokenizer, text).unfold(0, 16, 16).tolist()
        places = [rows.index(row) for row in windows.tolist()]
        assert places == sorted(set(places))
        seen[seed] = windows
    assert not torch.equal(seen[0], seen[1])


def test_a_choice_of_one_long_document_is_seeded_and_in_order(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(2000))))
    kept = []
    for seed in range(5):
        windows = token_windows(
            [tmp_path / "a.txt"], tokenizer, n_windows=6, window_length=8, seed=seed, bos="never"
        )
        rows = encode(tokenizer, (tmp_path / "a.txt").read_text()).unfold(0, 8, 8).tolist()
        places = [rows.index(row) for row in windows.tolist()]
        assert places == sorted(set(places))
        kept.append(tuple(places))
    assert len(set(kept)) == 5
    assert max(map(max, kept)) > len(rows) // 2 > min(map(min, kept))


@pytest.mark.parametrize("word", ["the cat sat on the mat ", "é", "0"], ids=["long", "short", "digits"])
def test_not_much_more_text_is_tokenized_than_needed(tokenizer, tmp_path: Path, word: str) -> None:
    documents = [word * 5 + str(number) for number in range(2000)]
    (tmp_path / "a.json").write_text(json.dumps(documents))
    recorder = Recorder(tokenizer)
    windows = token_windows(
        [tmp_path / "a.json"], recorder, n_windows=4, window_length=32, seed=0, bos="never"
    )
    assert windows.shape == (4, 32)
    n_tokens = sum(len(encode(tokenizer, text)) for text in recorder.texts)
    assert n_tokens < 5 * 4 * 32
    assert len(encode(tokenizer, "\n\n".join(documents))) > 20 * n_tokens


def test_fewer_windows_than_asked(tokenizer, sources) -> None:
    n_tokens = len(encode(tokenizer, "\n\n".join(SENTENCES)))
    windows = token_windows(sources, tokenizer, n_windows=1000, window_length=8, seed=0, bos="never")
    assert len(windows) in (n_tokens // 8, n_tokens // 8 + 1)


@pytest.mark.parametrize("n_windows", [0, 3])
@pytest.mark.parametrize(("bos", "needed"), [("never", 500), ("start", 499), ("every", 499)])
def test_text_too_short_for_one_window(tokenizer, sources, n_windows: int, bos, needed: int) -> None:
    message = rf"one\.txt, .*two\.json give \d+ tokens, one window needs {needed}.*--window-length"
    with pytest.raises(DataError, match=message):
        token_windows(sources, tokenizer, n_windows=n_windows, window_length=500, seed=0, bos=bos)


@pytest.mark.parametrize("asked", ["auto", "every", "start", "never"])
@pytest.mark.parametrize("adds", [True, False])
def test_bos(sources, asked, adds: bool) -> None:
    tokenizer = make_tokenizer(adds=adds)
    assert adds_bos(tokenizer) is adds
    windows = token_windows(sources, tokenizer, n_windows=0, window_length=4, seed=0, bos=asked)
    place = asked if asked != "auto" else "every" if adds else "never"
    text = encode(tokenizer, "\n\n".join(SENTENCES))
    if place == "every":
        expected = torch.cat([torch.full((len(text) // 3, 1), BOS), text.unfold(0, 3, 3)], dim=1)
    else:
        expected = torch.cat([torch.full((int(place == "start"),), BOS), text]).unfold(0, 4, 4)
    assert torch.equal(windows, expected)
    evaluated = evaluation_windows(sources, tokenizer, window_length=4, bos=asked)
    assert torch.equal(torch.stack(evaluated), expected)


@pytest.mark.parametrize("bos", ["every", "start"])
def test_bos_needs_a_bos_token(sources, bos) -> None:
    tokenizer = make_tokenizer(bos=False)
    assert not adds_bos(tokenizer)
    arguments = {"n_windows": 0, "window_length": 4, "seed": 0}
    with pytest.raises(ConfigError, match=f"bos '{bos}' needs"):
        token_windows(sources, tokenizer, bos=bos, **arguments)
    assert (token_windows(sources, tokenizer, bos="auto", **arguments) != BOS).all()


def test_numbers_out_of_range(tokenizer, sources) -> None:
    good = {"n_windows": 1, "window_length": 4, "seed": 0, "bos": "never"}
    for bad in ({"n_windows": -1}, {"window_length": 1}, {"bos": "evry"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            token_windows(sources, tokenizer, **(good | bad))
    with pytest.raises(ConfigError, match="max_tokens"):
        evaluation_windows(sources, tokenizer, window_length=4, bos="never", max_tokens=1)


def test_evaluation_joins_documents_in_order_blank_ones_too(tokenizer, tmp_path: Path) -> None:
    lines = ["", " = Title = \n", "", "the cat sat on the mat \n"] * 5
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    windows = evaluation_windows([tmp_path / "a.jsonl"], tokenizer, window_length=8, bos="never")
    expected = encode(tokenizer, "\n\n".join(lines)).unfold(0, 8, 8)
    assert torch.equal(torch.stack(windows), expected)


@pytest.mark.parametrize(("bos", "extra"), [("never", 0), ("start", 1), ("every", 1)])
def test_evaluation_of_short_text_is_one_short_window(tokenizer, sources, bos, extra: int) -> None:
    ids = encode(tokenizer, "\n\n".join(SENTENCES))
    (window,) = evaluation_windows(sources, tokenizer, window_length=500, bos=bos)
    assert torch.equal(window, torch.cat([torch.full((extra,), BOS), ids]))


def test_evaluation_of_a_single_token(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("t")
    with pytest.raises(DataError, match=r"a\.txt give 1 tokens, at least 2"):
        evaluation_windows([tmp_path / "a.txt"], tokenizer, window_length=8, bos="never")
    (window,) = evaluation_windows([tmp_path / "a.txt"], tokenizer, window_length=8, bos="every")
    assert window.tolist() == [BOS, encode(tokenizer, "t").item()]


def test_max_tokens_takes_the_beginning(tokenizer, sources) -> None:
    all_windows = evaluation_windows(sources, tokenizer, window_length=4, bos="never")
    some = evaluation_windows(sources, tokenizer, window_length=4, bos="never", max_tokens=10)
    assert [window.tolist() for window in some] == [window.tolist() for window in all_windows[:2]]


def check_that_bos_is_known_and_not_added(tokenizer, path: Path) -> None:
    assert not adds_bos(tokenizer)
    windows = token_windows([path], tokenizer, n_windows=8, window_length=128, seed=3, bos="auto")
    assert windows.shape == (8, 128)
    assert (windows[:, 0] != tokenizer.bos_token_id).all()
    started = token_windows([path], tokenizer, n_windows=8, window_length=128, seed=3, bos="every")
    assert (started[:, 0] == tokenizer.bos_token_id).all()
    assert (started[:, 1:] != tokenizer.bos_token_id).all()


def check_that_evaluation_windows_decode_to_the_text(tokenizer, text: str, folder: Path) -> None:
    (folder / "head.txt").write_text(text, encoding="utf-8")
    windows = evaluation_windows(
        [folder / "head.txt"], tokenizer, window_length=512, bos="start", max_tokens=5000
    )
    assert [len(window) for window in windows] == [512] * 9
    assert windows[0][0] == tokenizer.bos_token_id
    assert text.startswith(tokenizer.decode(torch.cat(windows)[1:]))


def test_a_real_tokenizer_has_a_bos_and_does_not_add_it(small_model: Path, tmp_path: Path) -> None:
    topics = library_text("prose").split("\n\n")
    path = tmp_path / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": topic}) + "\n" for topic in topics if topic.strip()))
    assert len(read_documents(path)) == sum(bool(topic.strip()) for topic in topics) > 1000
    check_that_bos_is_known_and_not_added(AutoTokenizer.from_pretrained(small_model), path)


def test_evaluation_windows_of_real_text_decode_to_it(small_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    check_that_evaluation_windows_decode_to_the_text(tokenizer, library_text("prose")[:20_000], tmp_path)


@pytest.mark.shared
def test_the_same_with_the_tokenizer_of_somebody_else(shared: Path, tmp_path: Path) -> None:
    """It is SentencePiece's kind, with a space put before the text."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "models" / "stories260K")
    path = shared / "data" / "domains" / "speeches_state_union.jsonl"
    assert len(read_documents(path)) == 65
    check_that_bos_is_known_and_not_added(tokenizer, path)
    story = shared / "data" / "eval" / "tinystories" / "tinystories_train_head2MB.txt"
    check_that_evaluation_windows_decode_to_the_text(
        tokenizer, story.read_text(encoding="utf-8")[:20_000], tmp_path
    )


# --- participants


def numbered(sizes: list[int]) -> list[torch.Tensor]:
    """Files of windows in which no two windows are equal."""
    ids = torch.arange(2 * sum(sizes)).view(-1, 2)
    return list(ids.split(sizes))


def rows(tensors: list[torch.Tensor]) -> list[list[int]]:
    return [row for tensor in tensors for row in tensor.tolist()]


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    n_participants=st.integers(1, 9),
    method=st.sampled_from(["iid", "dirichlet"]),
    alpha=st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 1e12]),
    seed=st.integers(0, 1000),
)
def test_every_window_goes_to_exactly_one_participant(sizes, n_participants, method, alpha, seed) -> None:
    files = numbered(sizes)
    arguments = {"method": method, "alpha": alpha, "seed": seed}
    if sum(sizes) < n_participants:
        with pytest.raises(DataError, match=f"{n_participants} participants .* found {sum(sizes)}"):
            partition(files, n_participants, **arguments)
        return
    parts = partition(files, n_participants, **arguments)
    assert len(parts) == n_participants
    assert min(map(len, parts)) >= 1
    assert sorted(rows(parts)) == sorted(rows(files))
    if method == "iid":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    again = partition(files, n_participants, **arguments)
    assert all(map(torch.equal, parts, again))


@pytest.mark.parametrize("method", ["iid", "dirichlet"])
def test_partition_depends_on_the_seed(method) -> None:
    first, second = (partition(numbered([50, 50]), 4, method=method, alpha=1.0, seed=seed) for seed in (0, 1))
    assert rows(first) != rows(second)


def test_iid_mixes_the_files() -> None:
    parts = partition(numbered([50, 50]), 2, method="iid", alpha=1.0, seed=0)
    for part in parts:
        assert 10 < int((part[:, 0] < 100).sum()) < 40


def test_file_gives_file_i_to_participant_i_mod_n() -> None:
    files = numbered([3, 4, 5])
    parts = partition(files, 2, method="file", alpha=1.0, seed=0)
    assert rows(parts[:1]) == rows([files[0], files[2]])
    assert rows(parts[1:]) == rows([files[1]])


@pytest.mark.parametrize("sizes", [[9, 9], [9, 0, 9]])
def test_fewer_files_with_text_than_participants(sizes) -> None:
    with pytest.raises(DataError, match="3 participants need one with text each, found 2"):
        partition(numbered(sizes), 3, method="file", alpha=1.0, seed=0)


def test_dirichlet_goes_from_one_owner_to_equal_shares() -> None:
    files = numbered([101, 101])
    for part in partition(files, 4, method="dirichlet", alpha=1e12, seed=0):
        counts = [int(sum(row in file.tolist() for row in part.tolist())) for file in files]
        assert all(count in (25, 26) for count in counts)
    concentrated = partition(files, 4, method="dirichlet", alpha=1e-3, seed=0)
    assert sorted(map(len, concentrated))[:2] == [1, 1]


def test_dirichlet_takes_windows_from_the_whole_file() -> None:
    parts = partition(numbered([100]), 2, method="dirichlet", alpha=1e12, seed=0)
    for part in parts:
        assert 10 < int((part[:, 0] < 100).sum()) < 40


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha must be greater than 0"):
        partition(numbered([9]), 2, method="dirichlet", alpha=alpha, seed=0)


def test_unknown_partition_and_no_participants() -> None:
    with pytest.raises(ConfigError, match="did you mean 'dirichlet'"):
        partition(numbered([9]), 2, method="dirichle", alpha=1.0, seed=0)
    with pytest.raises(ConfigError, match="at least 1, found 0"):
        partition(numbered([9]), 0, method="iid", alpha=1.0, seed=0)


def test_fingerprint_is_of_shape_and_ids() -> None:
    windows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = hashlib.sha256(struct.pack("<8q", 2, 3, 1, 2, 3, 4, 5, 6)).hexdigest()
    assert fingerprint(windows) == expected
    assert fingerprint(windows.to(torch.int32)) == expected
    assert fingerprint(windows.T.contiguous().T) == expected
    assert fingerprint(windows.view(3, 2)) != expected
    assert fingerprint(windows + 1) != expected
