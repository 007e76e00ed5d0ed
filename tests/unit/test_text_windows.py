"""From text to token windows."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedprllm.errors import ConfigError, DataError
from fedprllm.text.documents import read_documents
from fedprllm.text.windows import (
    adds_bos,
    evaluation_windows,
    fingerprint,
    token_windows,
)
from tests.library_text import library_text
from tests.tokenizers_for_text import BOS, SENTENCES, make_tokenizer


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
    (tmp_path / "a.json").write_text(json.dumps([{"text": document} for document in documents]))
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


def test_fingerprint_is_of_shape_and_ids() -> None:
    windows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = hashlib.sha256(struct.pack("<8q", 2, 3, 1, 2, 3, 4, 5, 6)).hexdigest()
    assert fingerprint(windows) == expected
    assert fingerprint(windows.to(torch.int32)) == expected
    assert fingerprint(windows.T.contiguous().T) == expected
    assert fingerprint(windows.view(3, 2)) != expected
    assert fingerprint(windows + 1) != expected
