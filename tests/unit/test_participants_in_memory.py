"""What a Python program can pass as a participant, and the names that participants get."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedprllm import DataError, Documents, PooledData, evaluate, prune
from fedprllm.files import names_of
from fedprllm.pruning.inputs import name_participants
from tests.contracts.test_walk import assert_same_bits
from tests.datasets_like import Rows

STORY = "The cat sat on the mat and looked at the moon.\nIt was late. "


class Dataset:
    """The part of ``datasets.Dataset`` that is used: its features, and a column."""

    def __init__(self, **columns: list) -> None:
        self._columns = columns
        self.column_names = list(columns)
        kinds = {name: "string" if isinstance(rows[0], str) else "int64" for name, rows in columns.items()}
        self.features = {name: type("Value", (), {"dtype": kind}) for name, kind in kinds.items()}

    def __getitem__(self, name: str) -> list:
        return self._columns[name]


def test_every_way_to_give_a_text_gives_the_same_model(small_model, tmp_path):
    from fedprllm import PruneConfig

    texts = [f"{STORY} {number} " * 40 for number in range(4)]
    path = tmp_path / "notes.jsonl"
    import json

    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PruneConfig(windows=2, window_length=32)
    expected = prune(small_model, {"a": str(path)}, config, out=tmp_path / "path")
    ways = {
        "documents": Documents(texts),
        "strings": texts,
        "dataset": Rows(id=[1, 2, 3, 4], text=texts),
        "list-of-paths": [str(path)],
    }
    for name, way in ways.items():
        found = prune(small_model, {"a": way}, config, out=tmp_path / name)
        assert_same_bits(expected.model_dir, found.model_dir)
        assert "moon" not in str(found.record), name
    assert prune(small_model, {"a": texts}, config, out=tmp_path / "strings").record.participants[
        "a"
    ].sources == ["4 documents in memory"]


def test_token_ids_of_any_kind(tiny, windows, tmp_path):
    ids = windows(0)
    expected = prune(tiny("llama"), {"a": ids}, out=tmp_path / "torch")
    for name, way in {
        "numpy": ids.numpy(),
        "lists": ids.tolist(),
        "int32": ids.numpy().astype(np.int32),
    }.items():
        assert_same_bits(expected.model_dir, prune(tiny("llama"), {"a": way}, out=tmp_path / name).model_dir)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (["missing/notes.txt"], "no such file or folder: missing/notes.txt"),
        (["notes.txt", STORY], "item 0 is no file or folder that exists"),
        ([1.5, 2.5], "must be integers"),
        ([[1, 2], [3]], "must have one length, found 1, 2 tokens"),
        ([], "found an empty list"),
        (iter([1]), "found list_iterator"),
        (None, "found NoneType"),
        (42, "found int"),
        (np.zeros((2, 4)), "must be integers"),
        (Rows(id=[1], body=[2]), "text"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(small_model, tmp_path, item, words):
    from fedprllm import PruneConfig

    config = PruneConfig(windows=1, window_length=8)
    with pytest.raises(DataError, match=words) as refusal:
        prune(small_model, {"a": item}, config, out=tmp_path / "run")
    assert "moon" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_generator_of_participants_is_refused(tiny, windows, tmp_path):
    with pytest.raises(DataError, match="or a mapping from names to them, found generator"):
        prune(tiny("llama"), (windows(n) for n in range(2)), out=tmp_path / "run")


def test_a_string_is_one_path_everywhere(small_model, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text(STORY * 20)
    (one,) = evaluate(small_model, str(path), window_length=64, max_tokens=256)
    assert one.text == "x"
    assert name_participants(PooledData(str(path), 2)) == PooledData(str(path), 2)
    ids = torch.ones(1, 8, dtype=torch.int64)
    result = prune(small_model, [ids], out=tmp_path / "run", eval_texts=str(path))
    assert [row.text for row in result.evaluation["dense"]] == ["x"]


@pytest.mark.parametrize(
    "sources",
    [
        ["d1/notes.txt", "d2/notes.txt", "d3/notes-2.txt"],
        ["notes-2.txt", "a/notes.txt", "b/notes.txt"],
        ["a.b.txt", "a.c.txt"],
        ["..", ".", ".hidden"],
        ["Notes.txt", "notes.txt"],
        ["north station.txt", "north-station.txt"],
        [f"{'x' * 250}{end}.txt" for end in "ab"],
    ],
)
def test_names_are_distinct_and_safe(sources):
    names = names_of(sources)
    assert len({name.casefold() for name in names}) == len(sources)
    for name in names:
        assert name.strip("."), name
        assert not set(name) & set("/\\ :")
        assert len(name.encode()) <= 255


def test_no_text_disappears(tmp_path):
    paths = []
    for folder, name in (("d1", "notes.txt"), ("d2", "notes.txt"), ("d3", "notes-2.txt")):
        path = tmp_path / folder / name
        path.parent.mkdir()
        path.write_text(folder)
        paths.append(str(path))
    named = name_participants(paths)
    assert isinstance(named, dict)
    assert sorted(str(source) for sources in named.values() for source in sources) == paths
