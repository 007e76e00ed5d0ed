"""Text of any size: encoded in pieces, sampled in one pass."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprllm.errors import DataError, ModelError
from fedprllm.text import encoding, sampling, windows
from fedprllm.text.documents import Part, joined, parts_of
from fedprllm.text.encoding import Encoder, adds_bos
from fedprllm.text.sampling import draw_units
from fedprllm.text.windows import evaluation_windows, fingerprint, token_windows
from tests.tokenizers_for_text import SENTENCES, make_tokenizer, make_word_tokenizer

TOKENIZERS = {"bytes": make_tokenizer(), "words": make_word_tokenizer()}
PIECES = ["the cat ", "sat  on\n", "\n\n", "é", "\U0001f600", "hill", " ", "x" * 50, "ab\tcd", "a dog ran\n"]


def whole(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def long_text(seed: int, n: int) -> str:
    return "".join(random.Random(seed).choices([*PIECES, *SENTENCES], k=n))


# --- encoding


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(encoding, "_PIECE", 400)
    monkeypatch.setattr(encoding, "_OVERLAP", 100)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seed", range(5))
def test_pieces_give_the_ids_of_the_whole(small_pieces, monkeypatch, kind: str, seed: int) -> None:
    monkeypatch.setattr(encoding, "_OVERLAP", 150)
    tokenizer, text = TOKENIZERS[kind], long_text(seed, 2000)
    blocks = [text[start : start + 700] for start in range(0, len(text), 700)]
    encoder = Encoder(tokenizer)
    assert len([*encoder.stream(blocks)]) > 20
    assert encoder.encode_all(blocks).tolist() == whole(tokenizer, text)
    assert encoder.encode_beginning(blocks, 77).tolist() == whole(tokenizer, text)[:77]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_longer_than_the_real_piece(kind: str) -> None:
    text = long_text(7, 30_000)
    assert len(text) > 4 * encoding._PIECE
    assert Encoder(TOKENIZERS[kind]).encode(text).tolist() == whole(TOKENIZERS[kind], text)


class Slow:
    """A tokenizer that tells no places, as those written in Python."""

    bos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": whole(TOKENIZERS["bytes"], text)}


def test_a_tokenizer_without_places_meets_at_line_breaks(small_pieces) -> None:
    # One line holds more than one piece: a word is never cut, and no text is lost or doubled.
    lines = [f"line {number} of the hill" for number in range(500)]
    text = "\n".join(lines)
    ids = Encoder(Slow()).encode(text).tolist()
    assert TOKENIZERS["bytes"].decode(ids) == text
    assert ids == whole(TOKENIZERS["bytes"], text)


@given(text=st.text(alphabet="ab \n", max_size=3000))
@settings(max_examples=30, deadline=None)
def test_pieces_hold_the_text_once(text: str) -> None:
    pieces = list(encoding._pieces([text[:1000], text[1000:]], 0))
    assert "".join(piece for piece, _ in pieces) == text


def test_only_the_beginning_of_a_text_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(("the cat sat on the mat\n" * 100_000).encode() + b"\xff")
    tokenizer = TOKENIZERS["bytes"]
    (window,) = evaluation_windows([path], tokenizer, window_length=64, bos="never", max_tokens=64)
    assert window.tolist() == whole(tokenizer, "the cat sat on the mat\n" * 100)[:64]
    with pytest.raises(DataError, match="0xff at byte offset 2300000"):
        evaluation_windows([path], tokenizer, window_length=64, bos="never")


def test_ids_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 50)
    tokenizer = TOKENIZERS["bytes"]
    highest = max(whole(tokenizer, "the cat sat on the mat " * 50))
    options = {"window_length": 8, "bos": "never"}
    for cut in (evaluation_windows, token_windows):
        more = {"n_windows": 0, "seed": 0} if cut is token_windows else {}
        cut([tmp_path / "a.txt"], tokenizer, vocabulary_size=highest + 1, **options, **more)
        with pytest.raises(DataError, match=rf"gives token id {highest}, .* holds 0 to {highest - 1}"):
            cut([tmp_path / "a.txt"], tokenizer, vocabulary_size=highest, **options, **more)


def test_a_bos_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    class HighBos(Slow):
        bos_token_id = 999

    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 50)
    with pytest.raises(DataError, match="gives token id 999"):
        evaluation_windows([tmp_path / "a.txt"], HighBos(), window_length=8, bos="start", vocabulary_size=500)


def test_a_tokenizer_that_gives_nothing() -> None:
    class Empty:
        bos_token_id = 1
        name_or_path = "some/model"

        def __call__(self, text, **options):
            return {"input_ids": []}

    with pytest.raises(ModelError, match="tokenizer of some/model gives no token for the text 'a'"):
        adds_bos(Empty())


# --- sampling


@pytest.fixture
def large_from(monkeypatch):
    monkeypatch.setattr(sampling, "SMALL", 1000)
    monkeypatch.setattr(windows, "SMALL", 1000)


def numbered_text(n: int) -> str:
    return "".join(f"line {number:06d} of it\n" for number in range(n))


def write(folder: Path, kind: str, text: str) -> Path:
    path = folder / f"a.{kind}"
    if kind == "txt":
        path.write_text(text)
    else:
        lines = [text] if kind == "json" else text.split("\n")
        rows = [json.dumps({"text": line}) for line in lines]
        path.write_text("\n".join(rows) if kind == "jsonl" else f"[{','.join(rows)}]")
    return path


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl"])
def test_windows_of_a_large_text_are_seeded_and_come_from_all_of_it(
    tmp_path: Path, large_from, kind: str
) -> None:
    path = write(tmp_path, kind, numbered_text(20_000))
    tokenizer = TOKENIZERS["bytes"]
    options = {"n_windows": 16, "window_length": 32, "bos": "never"}
    drawn = [token_windows([path], tokenizer, seed=seed, **options) for seed in range(4)]
    again = token_windows([path], tokenizer, seed=0, **options)
    assert torch.equal(drawn[0], again)
    assert len({fingerprint(one) for one in drawn}) == 4
    thirds: Counter[int] = Counter()
    for window in torch.cat(drawn):
        text = tokenizer.decode(window)
        number = next(word for word in text.split() if word.isdigit() and len(word) == 6)
        thirds[int(number) * 3 // 20_000] += 1
        assert "line" in text
    assert window.shape == (32,)
    assert min(thirds[third] for third in range(3)) > 8  # of 64


def test_windows_of_a_large_text_are_pinned(tmp_path: Path, large_from) -> None:
    """The choice is part of what a run's record promises: the same on every system and in every version."""
    path = write(tmp_path, "txt", numbered_text(5000))
    drawn = draw_units(parts_of([path]), unit_length=40, n_characters=100, seed=3)
    assert [unit.split("\n")[0] for unit in drawn] == [
        "line 003948 of it",
        "line 004290 of it",
        "line 002444 of it",
    ]


def test_a_window_of_a_long_document_is_unbroken_text(tmp_path: Path, large_from) -> None:
    text = numbered_text(20_000)
    path = write(tmp_path, "txt", text)
    tokenizer = TOKENIZERS["bytes"]
    drawn = token_windows([path], tokenizer, n_windows=8, window_length=64, seed=0, bos="never")
    assert all(tokenizer.decode(window) in text for window in drawn)
    started = token_windows([path], tokenizer, n_windows=8, window_length=64, seed=0, bos="start")
    assert started[0, 0] == tokenizer.bos_token_id
    assert all(tokenizer.decode(window) in text for window in started[1:])
    assert (started == tokenizer.bos_token_id).sum() == 1
    every = token_windows([path], tokenizer, n_windows=8, window_length=64, seed=0, bos="every")
    assert (every[:, 0] == tokenizer.bos_token_id).all()
    assert all(tokenizer.decode(window[1:]) in text for window in every)


def test_every_unit_is_equally_likely() -> None:
    parts = [Part(f"document {number:02d}", starts=True) for number in range(10)]
    first = Counter(draw_units(parts, unit_length=100, n_characters=10, seed=seed)[0] for seed in range(1000))
    assert len(first) == 10
    assert all(60 < count < 140 for count in first.values())  # 100 expected, 9.5 standard deviation


def test_what_is_drawn_does_not_depend_on_how_much_is_kept() -> None:
    parts = [Part(f"document {number:03d}", starts=True) for number in range(300)]
    everything = draw_units(parts, unit_length=100, n_characters=10**9, seed=1)
    assert sorted(everything) == [part.text for part in parts]
    for n_units in (1, 7, 50):
        some = draw_units(iter(parts), unit_length=100, n_characters=12 * n_units, seed=1)
        assert some == everything[:n_units]


def test_the_blocks_in_which_a_document_comes_do_not_matter() -> None:
    text = numbered_text(3000)
    expected = draw_units([Part(text, starts=True)], unit_length=90, n_characters=2000, seed=0)
    for size in (1000, 4096):
        parts = [Part(text[start : start + size], start == 0) for start in range(0, len(text), size)]
        assert draw_units(parts, unit_length=90, n_characters=2000, seed=0) == expected


def test_more_is_read_where_tokens_are_long(tmp_path: Path, large_from, monkeypatch) -> None:
    """What is kept at first does not hold the windows; the result is that of keeping enough at once."""
    path = write(tmp_path, "txt", numbered_text(20_000))
    options = {"n_windows": 16, "window_length": 32, "bos": "never", "seed": 0}
    expected = token_windows([path], TOKENIZERS["bytes"], **options)
    monkeypatch.setattr(windows, "_READ_PER_TOKEN", 1)
    assert torch.equal(token_windows([path], TOKENIZERS["bytes"], **options), expected)


def test_all_text_is_looked_at_where_it_is_short(tmp_path: Path, large_from, monkeypatch) -> None:
    """More windows than units: what the units leave over counts too."""
    tokenizer = TOKENIZERS["bytes"]
    text = "\n".join("the cat sat on the mat" for _ in range(3000))
    path = write(tmp_path, "txt", text)
    monkeypatch.setattr(windows, "_READ_PER_TOKEN", 1)
    ids = torch.tensor(whole(tokenizer, text))
    drawn = token_windows([path], tokenizer, n_windows=1200, window_length=16, seed=0, bos="never")
    assert drawn.shape == (1200, 16)
    rows = {tuple(row) for row in ids.unfold(0, 16, 16).tolist()}
    assert all(tuple(row) in rows for row in drawn.tolist())


def test_all_text_in_pieces_is_the_joined_text_cut(tmp_path: Path, small_pieces) -> None:
    path = write(tmp_path, "jsonl", numbered_text(500))
    tokenizer = TOKENIZERS["bytes"]
    drawn = token_windows([path], tokenizer, n_windows=0, window_length=16, seed=0, bos="never")
    text = "".join(joined(parts_of([path])))
    assert text == numbered_text(500).strip().replace("\n", "\n\n")
    expected = torch.tensor(whole(tokenizer, text)).unfold(0, 16, 16)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize(
    "run", ["=" * 400_000, "ab" * 200_000, "€" * 150_000], ids=["equals", "pairs", "euro"]
)
def test_nothing_is_lost_in_a_long_run(run):
    """Pieces of a run may share no token boundary that both agree on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("before after=ab€ "))
    words = [("<unk>", 0.0), *((letter, -4.0) for letter in letters)]
    words += (
        [("=" * n, -3.0 - n / 10) for n in (2, 3, 5, 7)]
        + [("ab" * n, -3.0) for n in (2, 3, 7)]
        + [("€€€", -3.0)]
    )
    fast = Tokenizer(models.Unigram(words, unk_id=0))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="never", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>")
    text = f"before {run} after"
    ids = Encoder(tokenizer).encode(text)
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
