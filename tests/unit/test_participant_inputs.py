"""What may be given as a participant's text, and as a text to evaluate on."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedprllm import DataError, Documents, ModelError, PruneConfig, evaluate, prune
from fedprllm.cli.app import app
from fedprllm.errors import FedprllmWarning
from fedprllm.evaluation.perplexity import load_tokenizer
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.inputs import (
    PooledData,
    evaluation_texts,
    make_participants,
    name_participants,
)
from tests.datasets_like import Rows

CONFIG = PruneConfig(windows=2, window_length=16)
STORY = "Once upon a time there was a little girl who lived near the sea. "
SECRET = "sunflower"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "x.txt"
    path.write_text(STORY * 40)
    return path


def windows_of(model: Path, item: object) -> torch.Tensor:
    named = name_participants([item])
    (member,), _ = make_participants(BlockwiseModel(model), named, CONFIG)
    return member.windows


IDS = [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize(
    "item",
    [
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        np.array(IDS),
        np.array(IDS, dtype=np.uint16),
        np.array(IDS, dtype=">i4"),
        IDS,
        tuple(map(tuple, IDS)),
        [np.array(row) for row in IDS],
        [torch.tensor(row) for row in IDS],
        [[np.int64(one) for one in row] for row in IDS],
    ],
    ids=lambda item: type(item).__name__,
)
def test_token_ids(tiny, item) -> None:
    windows = windows_of(tiny("llama"), item)
    assert windows.dtype == torch.int64
    assert windows.tolist() == IDS


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.ones((2, 4)), r"must be integers \[n_windows, window_length\], found float64 \(2, 4\)"),
        (np.array([["a"]]), "must be integers"),
        (np.ones((2, 4), dtype=bool), "must be integers"),
        ([1, 2, 3], "must be integers .* found a list of int"),
        ([[1, 2], [3]], "must have one length, found 1, 2 tokens"),
        ([[1.5, 2.0]], "must be integers"),
        ([[[1, 2]]], "must be integers"),
        ([[1, 2], "a.txt"], "must be integers .* found a list of list, str"),
        ([[True, False]], "must be integers"),
        ((word for word in ["a"]), "found generator. Make it a list first"),
        (iter(["a"]), "found list_iterator. Make it a list first"),
        ({"train": "a.txt"}, "found dict. Name one of its entries"),
        (5, "found int"),
        (None, "found NoneType"),
        (b"a.txt", "found bytes"),
        ([], "found an empty list"),
        ([Path("a.txt"), None], "item 1: expected a path, found NoneType"),
        ("", "found an empty string"),
        (["  "], "found an empty string"),
    ],
)
def test_refused_before_the_model_is_looked_for(tmp_path: Path, item, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        prune(tmp_path / "no-model", {"north": item}, out=tmp_path / "run")
    assert "participant 'north'" in str(refused.value)


@pytest.mark.parametrize(
    ("participants", "message"),
    [
        ((one for one in ["a.txt"]), "found generator"),
        (5, "found int"),
        (Rows(text=["a"]), "found one Rows: wrap it in a list"),
        (np.zeros((2, 4), dtype=int), "found one tensor: wrap it in a list"),
        (Documents(["a"]), "found one Documents: wrap it in a list"),
        ({"a.txt"}, "found set"),
    ],
)
def test_participants_of_another_kind(tmp_path: Path, participants, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prune(tmp_path / "no-model", participants, out=tmp_path / "run")


def test_text_in_memory_is_read_like_the_same_text_in_a_file(small_model, tmp_path: Path) -> None:
    documents = [f"{STORY}{number}. {STORY}" for number in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(documents))
    expected = windows_of(small_model, tmp_path / "a.json")
    for item in (
        Documents(documents),
        [Documents(documents)],
        documents,
        tuple(documents),
        Rows(text=documents, id=list(range(30))),
        [Rows(text=documents)],
        [Rows(text=documents[:10]), Documents(documents[10:])],
    ):
        assert torch.equal(windows_of(small_model, item), expected)


def test_strings_are_paths_or_texts(text: Path, monkeypatch) -> None:
    monkeypatch.chdir(text.parent)

    def item(value: object) -> object:
        return name_participants({"north": value})["north"]

    assert item("x.txt") == ["x.txt"]
    assert item(["x.txt", str(text)]) == ["x.txt", str(text)]
    assert item(["hf:org/name:train"]) == ["hf:org/name:train"]
    assert item(["missing.txt"]) == ["missing.txt"]
    (documents,) = item(["Once upon a time.", "two\nlines"])
    assert isinstance(documents, Documents)
    assert documents.texts == ("Once upon a time.", "two\nlines")
    for ambiguous in (
        ["x.txt", "Once upon a time there was"],
        ["x.txt", f"{SECRET}\n"],
        ["y.txt", f"{SECRET} upon a time there"],
        ["word", "another"],
        ["a.txt", "b.txt"],
        ["data/of the first ward", f"{SECRET} upon a time"],
    ):
        with pytest.raises(DataError, match=r"Documents\(\[\.\.\.\]\)") as refused:
            item(ambiguous)
        assert SECRET not in str(refused.value)


def test_a_text_given_as_a_participant_is_not_quoted(tmp_path: Path) -> None:
    for private in (f"{SECRET} " * 500, f"The {SECRET} grows.\nIt is yellow."):
        with pytest.raises(DataError, match="looks like text itself") as refused:
            prune(tmp_path / "no-model", [private], out=tmp_path / "run")
        assert SECRET not in str(refused.value)
        assert len(str(refused.value)) < 300


def test_no_text_disappears_when_names_collide(small_model, tmp_path: Path) -> None:
    paths = []
    for number, name in enumerate(["d1/notes.txt", "d2/notes.txt", "d3/notes-2.txt", "d4/Notes.txt"]):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(f"{STORY}{number} " * 40)
        paths.append(path)
    result = prune(small_model, paths, CONFIG, out=tmp_path / "run", eval_texts=paths)
    assert list(result.record.participants) == ["Notes-4", "notes", "notes-2", "notes-3"]
    sources = {name: one.sources for name, one in result.record.participants.items()}
    assert sources == {
        "notes": [str(paths[0])],
        "notes-3": [str(paths[1])],
        "notes-2": [str(paths[2])],
        "Notes-4": [str(paths[3])],
    }
    assert [row.text for row in result.evaluation["dense"]] == ["notes", "notes-3", "notes-2", "Notes-4"]


def test_reserved_names_do_not_take_the_place_of_other_rows(small_model, tmp_path: Path) -> None:
    for name in ("dense", "model"):
        (tmp_path / f"{name}.txt").write_text(f"{STORY}{name} " * 40)
    paths = [tmp_path / "dense.txt", tmp_path / "model.txt"]
    config = CONFIG.model_copy(update={"strategy": "local-only"})
    result = prune(small_model, paths, config, out=tmp_path / "run", eval_texts=paths[0])
    assert list(result.model_dirs) == ["dense-2", "model-2"]
    assert list(result.evaluation) == ["dense", "dense-2", "model-2"]
    dense = evaluate(small_model, paths[0], window_length=16)
    assert result.evaluation["dense"][0].nll == dense[0].nll
    assert list(name_participants({"dense": paths[0], "x": paths[1]})) == ["dense-2", "x"]


def test_a_name_of_250_characters_with_little_memory(small_model, tmp_path: Path) -> None:
    path = tmp_path / f"{'n' * 246}.txt"
    path.write_text(STORY * 40)
    config = PruneConfig(windows=2, window_length=16, strategy="local-only", memory_limit=100)
    result = prune(small_model, [path, path], config, out=tmp_path / "run")
    assert len(result.model_dirs) == 2


def test_documents_in_memory_are_counted_and_never_recorded(small_model, tmp_path: Path) -> None:
    documents = [f"{SECRET} {STORY}" for _ in range(20)]
    result = prune(small_model, [Documents(documents), Rows(text=documents)], CONFIG, out=tmp_path / "run")
    sources = [one.sources for one in result.record.participants.values()]
    assert sources == [["20 documents in memory"], ["dataset of 20 rows in memory"]]
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert all(SECRET.encode() not in path.read_bytes() for path in written)


def test_a_string_is_one_path_everywhere(small_model, text: Path, monkeypatch) -> None:
    monkeypatch.chdir(text.parent)
    monkeypatch.setenv("HOME", str(text.parent))
    expected = evaluate(small_model, ["x.txt"], window_length=16)
    assert [row.text for row in expected] == ["x"]
    for texts in ("./x.txt", str(text), text, "~/x.txt", {"x": "x.txt"}, {"x": [text]}, Path("~/x.txt")):
        assert evaluate(small_model, texts, window_length=16) == expected
    model = BlockwiseModel(small_model)
    assert list(evaluation_texts(model, "/" + str(text).lstrip("/"), CONFIG)) == ["x"]
    (member,), _ = make_participants(model, {"north": "~/x.txt"}, CONFIG)
    for paths in ("x.txt", text, ["~/x.txt"]):
        (pooled,), _ = make_participants(model, PooledData(paths, 1), CONFIG)
        assert pooled.sources == [str(paths if isinstance(paths, (str, Path)) else paths[0])]
    assert member.windows.shape == (2, 16)


def test_evaluation_of_texts_in_memory(small_model, text: Path) -> None:
    documents = Documents([text.read_text()])
    (row,) = evaluate(small_model, documents, window_length=16)
    assert row.text == "in-memory"
    (expected,) = evaluate(small_model, text, window_length=16)
    assert row.nll == expected.nll
    with pytest.raises(DataError, match="found generator"):
        evaluate(small_model, (one for one in ["x.txt"]))


def test_a_short_file_among_others_takes_nothing_from_a_draw(small_model, text: Path) -> None:
    (text.parent / "short.txt").write_text("Once.")
    data = PooledData([text.parent / "short.txt", text], 2)
    members, _ = make_participants(BlockwiseModel(small_model), data, CONFIG)
    assert [member.windows.shape for member in members] == [(2, 16), (2, 16)]
    assert members[0].sources == [str(text)]
    with pytest.raises(DataError, match=r"short\.txt"):
        make_participants(BlockwiseModel(small_model), PooledData(data.paths, 2, "file"), CONFIG)
    with pytest.raises(DataError, match="none of the 2 texts gives one window"):
        make_participants(BlockwiseModel(small_model), PooledData([data.paths[0]] * 2, 2), CONFIG)


def test_text_for_fewer_windows_is_said(small_model, tmp_path: Path) -> None:
    (tmp_path / "little.txt").write_text(STORY * 4)
    (tmp_path / "much.txt").write_text(STORY * 100)
    command = ["prune", str(small_model), "--windows", "12", "--window-length", "16", "--out"]
    texts = [f"--participant={tmp_path / name}" for name in ("little.txt", "much.txt")]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "run"), *texts])
    assert done.exit_code == 0
    shown = " ".join(done.output.split())
    assert "little is calibrated on" in shown
    assert "12 were asked for" in shown
    assert "much is" not in shown


def test_token_windows_are_never_too_few(tiny, windows, tmp_path: Path) -> None:
    result = prune(tiny("llama"), [windows(0)], out=tmp_path / "run")
    assert result.record.notes is None


def test_python_is_told_too_and_the_record_keeps_it(small_model, tmp_path: Path) -> None:
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "a.txt").write_text(STORY * 4)
    (folder / "LICENSE-MIT").write_text("all rights " * 50)
    (folder / "README_de.md").write_text("Lies mich. " * 50)
    config = PruneConfig(windows=12, window_length=16)
    with pytest.warns(FedprllmWarning) as said:
        result = prune(small_model, [folder], config, out=tmp_path / "run")
    notes = [str(warning.message) for warning in said]
    assert notes == result.record.notes
    assert re.fullmatch(r"north is calibrated on \d+ windows of 16 tokens; 12 were asked for", notes[0])
    assert notes[1] == f"{folder}: LICENSE-MIT, README_de.md left out: not texts but files about them"


def test_a_tokenizer_of_another_model(tiny, small_model, text: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_model / name, tmp_path / "model" / name)
    ids = [[1] * 16]
    for texts in ({"participants": [text]}, {"participants": [ids], "eval_texts": text}):
        with pytest.raises(DataError, match=r"tokenizer of .*model gives token id \d+, .* holds 0 to 127"):
            prune(tmp_path / "model", texts.pop("participants"), CONFIG, out=tmp_path / "run", **texts)
    with pytest.raises(DataError, match="holds 0 to 127"):
        evaluate(tmp_path / "model", text)


def test_code_of_a_model_folder_is_never_run(small_model, tmp_path: Path) -> None:
    shutil.copytree(small_model, tmp_path / "model")
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    file = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    file.write_text(json.dumps(settings))
    with contextlib.suppress(ModelError):
        load_tokenizer(tmp_path / "model")
    assert not (tmp_path / "ran").exists()
