"""Names of participants and texts: distinct, safe on every file system, and none disappears."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprllm.errors import DataError
from fedprllm.files import distinct_names, names_of
from fedprllm.pruning.inputs import name_participants


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["d1/notes.txt", "d2/notes.txt", "d3/notes-2.txt"], ["notes", "notes-3", "notes-2"]),
        (["d3/notes-2.txt", "d1/notes.txt", "d2/notes.txt"], ["notes-2", "notes", "notes-3"]),
        (["a.txt", "b/a.txt", "c/a.txt"], ["a", "a-2", "a-3"]),
        (["a.b.txt", "a.c.txt"], ["a.b", "a.c"]),
        (["notes.v1", "notes.v2"], ["notes.v1", "notes.v2"]),
        (["visits.2023", "visits.2024.jsonl.gz", "visits.csv.XZ"], ["visits.2023", "visits.2024", "visits"]),
        (["A.txt", "a.txt"], ["A", "a-2"]),
        (["caf\u00e9.txt", "cafe\u0301.txt"], ["caf\u00e9", "caf\u00e9-2"]),
        ([".hidden", ".txt"], ["hidden", "txt"]),
        (["hf:org/name:train", "hf:org/name:test"], ["hf-org-name-train", "hf-org-name-test"]),
        (["two words.txt", "two-words.txt"], ["two-words", "two-words-2"]),
        (["con.txt", "aux.b.txt"], ["con-2", "aux-2.b"]),
        (["con.txt", "CON.txt", "con-2"], ["con-3", "CON-4", "con-2"]),
        ([Path("d") / "x.json"], ["x"]),
        (["-rf.txt", "-_"], ["rf", "_"]),
    ],
)
def test_names(sources, expected) -> None:
    assert names_of(sources) == expected


def test_a_folder_of_here_has_a_name(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "hospital" / "inner"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert names_of([".", "..", "~"]) == ["inner", "hospital", "home"]


def test_reserved_names_are_given_to_nobody() -> None:
    assert names_of(["dense.txt", "Dense", "model.md"], ["dense", "model"]) == [
        "dense-2",
        "Dense-3",
        "model-2",
    ]
    assert distinct_names(["dense", "dense-2"], ["dense"]) == ["dense-3", "dense-2"]


def test_keys_keep_their_dots_and_collisions_stay_apart() -> None:
    assert distinct_names(["north.1", "north.2", "a/b", "a-b", "a b"]) == [
        "north.1",
        "north.2",
        "a-b",
        "a-b-2",
        "a-b-3",
    ]


def test_long_names_are_cut_and_stay_apart() -> None:
    names = names_of([f"{'x' * 250}{end}.txt" for end in ("a", "b")] + ["\u00e9" * 120])
    assert len(set(names)) == 3
    assert all(len(name.encode()) <= 80 for name in names)
    assert names[0].startswith("x" * 60)
    assert names == names_of([f"{'x' * 250}{end}.txt" for end in ("a", "b")] + ["\u00e9" * 120])
    assert names_of([f"{'x' * 250}b.txt"]) == names[1:2]


@pytest.mark.parametrize("source", ["\U0001f3e5.txt", "???", "...", "\u0301.jsonl", "-.csv", "\u200b"])
def test_what_cannot_name_a_file_is_refused(source) -> None:
    with pytest.raises(DataError, match="expected at least one letter or digit"):
        names_of([source])
    with pytest.raises(DataError, match="cannot name a participant"):
        name_participants({source.partition(".")[0]: ["a.txt"]})


TRICKY = st.text(alphabet="aA.-2 /\u00e9\u0301:\\", min_size=0, max_size=6)


@given(wanted=st.lists(TRICKY | st.sampled_from(["con", "dense", "..a", "-a"]), max_size=12))
def test_names_are_distinct_and_safe(wanted: list[str]) -> None:
    wanted = [name for name in wanted if any(letter.isalnum() for letter in name)]
    names = distinct_names(wanted, ["dense"])
    assert len(names) == len(wanted)
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert name.strip(".") == name != ""
        assert not set(name) & set('/\\:*?"<>| \0')
        assert name.casefold() not in ("dense", "con")
