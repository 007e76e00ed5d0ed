"""Every file of a run, damaged in every way, is computed again or named; nothing else can happen."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from fedprllm import PruneConfig, PruneResult, RunError, prune
from fedprllm.errors import FedprllmWarning
from fedprllm.files import read_sealed, write_sealed
from fedprllm.pruning.run_folder import Run
from fedprllm.report.page import write_report

BLOCK = 1  # the run is stopped once this block is finished; the model has three


class _Stopped(Exception):
    pass


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "bit": _flip_a_bit,
    "gone": Path.unlink,
}
KINDS: dict[str, dict[str, Any]] = {
    "one-shot": {"memory_limit": 1},
    "iterative": {"strategy": "iterative"},
    "alone": {"strategy": "local-only", "allocation": "owl"},
}


def people() -> list[torch.Tensor]:
    return [torch.randint(4, 128, (1, 16), generator=torch.Generator().manual_seed(n)) for n in (2, 3)]


def files_of(folder: Path) -> list[Path]:
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path for path in files if path.name != ".lock"]


def what_counts(result: PruneResult) -> dict[str, Any]:
    """Everything a run leaves, without the time it took."""
    record = result.record.as_json()
    for block in record["blocks"]:
        block.pop("seconds")
        block.pop("newest", None)
        # The order of a safetensors file's metadata differs from one time to the next.
        block["files"] = {name: one for name, one in block["files"].items() if not name.startswith("votes")}
    models = {
        f"{name}/{path.name}": path.read_bytes()
        for name, folder in result.model_dirs.items()
        for path in folder.iterdir()
        if path.name != "README.md"
    }
    return {"record": record, **models, **{name: votes.tolist() for name, votes in result.votes.items()}}


def stopped(command: Callable[[], object]) -> None:
    """Run a command that ends as if it were killed after a block."""
    finish = Run.finish_block

    def stopping(self: Run, index: int, *arguments: Any, **more: Any) -> None:
        finish(self, index, *arguments, **more)
        if index == BLOCK:
            raise _Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish_block", stopping)
        with pytest.raises(_Stopped):
            command()


def named_or(command: Callable[[], object]) -> tuple[str | None, object]:
    """What a refusal says, or what the command returns."""
    try:
        return None, command()
    except RunError as error:
        return str(error), None


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_an_unfinished_run(tiny, tmp_path, kind) -> None:
    config = PruneConfig(**KINDS[kind])
    expected = what_counts(prune(tiny("llama"), people(), config, out=tmp_path / "undisturbed"))
    stopped(lambda: prune(tiny("llama"), people(), config, out=tmp_path / "stopped"))
    n_named = n_again = 0
    ways = list(DAMAGES) if kind == "one-shot" else ["bit"]
    rest = cycle(DAMAGES)
    for name in files_of(tmp_path / "stopped"):
        # One kind of run meets every damage of every file, the others one in turn and a flipped bit.
        for damage in dict.fromkeys([*ways, next(rest)]):
            out = tmp_path / "damaged"
            shutil.copytree(tmp_path / "stopped", out)
            DAMAGES[damage](out / name)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", FedprllmWarning)
                words, found = named_or(
                    lambda out=out: what_counts(prune(tiny("llama"), people(), config, out=out))
                )
            assert found == expected if words is None else name.name in words, (name, damage)
            n_named += words is not None
            n_again += any(name.name in str(warning.message) for warning in said)
            shutil.rmtree(out)
    assert n_named <= 4, "of all files only run.json cannot be computed again"
    assert n_again >= 6, "records, votes, shards and hidden states must be noticed and not only be ignored"


def test_a_stop_between_the_model_and_the_result(tiny, tmp_path) -> None:
    """The model is in place already, and its files outside the blocks are written again."""
    expected = what_counts(prune(tiny("llama"), people(), out=tmp_path / "run"))
    for name in files_of(tmp_path / "run" / "model"):
        (tmp_path / "run" / "result.json").unlink()
        _flip_a_bit(tmp_path / "run" / "model" / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FedprllmWarning)
            assert what_counts(prune(tiny("llama"), people(), out=tmp_path / "run")) == expected, name
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(RunError, match=r"model/config\.json is missing.*repeat the command"):
        prune(tiny("llama"), people(), out=tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_a_finished_run(tiny, tmp_path, damage) -> None:
    def read(out: Path) -> dict[str, Any]:
        return what_counts(prune(tiny("llama"), people(), out=out))

    prune(tiny("llama"), people(), out=tmp_path / "run")
    expected = read(tmp_path / "run")
    n_named = 0
    for name in files_of(tmp_path / "run"):
        whole = (tmp_path / "run" / name).read_bytes()
        DAMAGES[damage](tmp_path / "run" / name)
        words, found = named_or(lambda: read(tmp_path / "run"))
        assert found == expected if words is None else name.name in words, name
        n_named += words is not None
        (tmp_path / "run" / name).write_bytes(whole)
    assert n_named >= 9, "run.json, result.json, four shards and three files of votes at least"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_page_of_a_damaged_record_is_not_written(tiny, tmp_path, damage) -> None:
    prune(tiny("llama"), people(), out=tmp_path / "run")
    DAMAGES[damage](tmp_path / "run" / "result.json")
    with pytest.raises(RunError, match=r"result\.json"):
        write_report(tmp_path / "run", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_votes_are_checked_when_they_are_read(tiny, tmp_path) -> None:
    result = prune(tiny("llama"), people(), out=tmp_path / "run")
    name = next(iter(result.votes))
    _flip_a_bit(tmp_path / "run" / "votes" / "block-0000.safetensors")
    with pytest.raises(RunError, match=r"block-0000\.safetensors is damaged"):
        PruneResult.load(tmp_path / "run").votes[name]


def test_files_left_by_a_kill_do_not_get_into_the_model(tiny, tmp_path) -> None:
    stopped(lambda: prune(tiny("llama"), people(), out=tmp_path / "run"))
    left = tmp_path / "run" / "model.unfinished" / ".model-00004-of-00004.safetensors.123.tmp"
    left.write_bytes(b"half")
    prune(tiny("llama"), people(), out=tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_run_moves_with_its_text(tiny, tmp_path, monkeypatch, small_model) -> None:
    """Where a text lies does not matter; what it holds does."""
    text = tmp_path / "t" / "a.txt"
    text.parent.mkdir()
    text.write_text("Once upon a time there was a little girl who saw a bird. " * 40)
    config = PruneConfig(windows=2, window_length=16)
    monkeypatch.chdir(tmp_path)
    first = prune(small_model, ["t/a.txt"], config, out=tmp_path / "run")
    assert prune(small_model, [text], config, out=tmp_path / "run").record == first.record
    text.write_text("Another text that has other words. " * 40)
    with pytest.raises(RunError, match=r"belongs to another run: participants\.a\.fingerprint"):
        prune(small_model, ["t/a.txt"], config, out=tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_run_does_not_go_on_with_another_model(small_model, tmp_path, name) -> None:
    """Weights are the same, and the configuration or the tokenizer is not."""
    shutil.copytree(small_model, tmp_path / "model")
    stopped(lambda: prune(tmp_path / "model", people(), out=tmp_path / "run"))
    settings = json.loads((tmp_path / "model" / name).read_text())
    if name == "config.json":
        settings |= {"rope_theta": 5e5, "rope_parameters": None}
    else:
        vocabulary = settings["model"]["vocab"]
        one, other = list(vocabulary)[-2:]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "model" / name).write_text(json.dumps(settings))
    with pytest.raises(RunError, match=r"belongs to another run: model\.fingerprint"):
        prune(tmp_path / "model", people(), out=tmp_path / "run")


def test_participants_with_one_text_keep_their_own_states(tiny, tmp_path) -> None:
    """They prune different blocks, so that what they compute differs from the first block on."""
    same = [people()[0], people()[0].clone()]
    config = PruneConfig(block_fraction="0.7")
    expected = what_counts(prune(tiny("llama"), same, config, out=tmp_path / "undisturbed"))
    stopped(lambda: prune(tiny("llama"), same, config, out=tmp_path / "run"))
    assert what_counts(prune(tiny("llama"), same, config, out=tmp_path / "run")) == expected


def test_what_is_sealed_is_read_as_it_was_written(tmp_path) -> None:
    values = {"a": [1, 2.5, None, "\u00e9\u2028"], "b": {"c": 1e-300, "d": True}}
    write_sealed(tmp_path / "a.json", values)
    assert read_sealed(tmp_path / "a.json") == values
    changed = json.loads((tmp_path / "a.json").read_text()) | {"b": {"c": 1e-300, "d": False}}
    (tmp_path / "a.json").write_text(json.dumps(changed))
    with pytest.raises(RunError, match=r"a\.json is damaged"):
        read_sealed(tmp_path / "a.json")


def test_nothing_is_named_before_it_is_on_the_disk(tiny, tmp_path, monkeypatch) -> None:
    """A record is written after the file and its folder were flushed, for every file that it names."""
    import os

    flushed: set[str] = set()
    sync = os.fsync

    def note(descriptor: int) -> None:
        flushed.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    finish = Run.finish_block

    def check(self: Run, index: int, *arguments: Any, **more: Any) -> None:
        finish(self, index, *arguments, **more)
        record = json.loads(self._record_path(index).read_text())
        for name in [*record["files"], *record.get("newest", {})]:
            path = self.folder / name.replace("model/", "model.unfinished/")
            assert any(Path(one).name.startswith(f".{path.name}.") for one in flushed), name
            assert str(path.parent) in flushed, name

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not tell the names of open files")
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Run, "finish_block", check)
    prune(tiny("llama"), [torch.randint(4, 128, (2, 16))], out=tmp_path / "run")
