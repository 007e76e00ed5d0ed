"""The rehearsal: one command from nothing to the pruned model, after which no process is left running."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

pytest.importorskip("nvflare")

from fedprllm import ConfigError, HealConfig, PruneConfig, heal, prune
from fedprllm.federation.flare.processes import running
from fedprllm.federation.flare.rehearsal import empty_folder
from fedprllm.federation.site.spool import read_ledger
from fedprllm.files import read_json
from tests.federation_helpers import same_model, texts
from tests.federation_processes import finish, start, wait_until
from tests.isolation import torch_threads

pytestmark = [pytest.mark.federation, pytest.mark.filterwarnings("ignore")]

_CLI = "from fedprllm.cli.app import main; main()"
_SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "federation_in_one_script.py"
_EXAMPLE = f"import runpy; runpy.run_path({str(_SCRIPT)!r}, run_name='__main__')"
QUICK = ["--windows", "2", "--window-length", "32"]


def rehearse(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return start(_CLI, "federation", "rehearse", "--out", str(folder), *arguments)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process on this machine that was started for the rehearsal, whatever its current parent."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(folder) in word for word in words) and "rehearse" not in words:
            found.append(process)
    return found


@pytest.fixture
def given(small_model, tmp_path):
    """Model, texts by site, and the command-line options for both."""
    paths = {f"site-{n}": path for n, path in enumerate(texts(tmp_path, ["north", "south"]).values(), 1)}
    options = ["--participants", "2", "--model", str(small_model)]
    return small_model, paths, [*options, *(word for path in paths.values() for word in ("--data", path))]


def test_a_rehearsal_gives_the_model_of_a_run_in_one_process_and_leaves_no_process(
    given, tmp_path, monkeypatch
):
    """The rehearsal is the one of examples/, which compares it with a run in one process itself."""
    model, paths, _ = given
    folder = tmp_path / "rehearsal"
    # The number that the command gives each site.
    monkeypatch.setenv("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    output = finish(start(_EXAMPLE, str(model), *paths.values(), "--out", str(tmp_path), *QUICK))
    assert output.endswith("\n0 parameters differ\n")
    assert "50.00%" in output
    assert output.count("the same model") == len(paths)
    assert not processes_of(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".rehearsal", "ledgers", "run"]
    same_model(folder / "run" / "model", tmp_path / "one-process" / "model")
    sent = read_json(folder / "run" / "result.json")["participants"]
    for name in paths:
        lines = read_ledger(folder / "ledgers" / f"{name}.jsonl")
        n_bytes = sum(line["bytes"] for line in lines if line["direction"] == "sent")
        assert n_bytes == sent[name]["update_bytes"]


def is_part_of(folder: Path, module: str) -> bool:
    return any(module in word for process in processes_of(folder) for word in process.info["cmdline"])


def test_who_was_started_when_the_interruption_came_is_ended_too():
    started = []

    def interrupted() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "300"]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), running(interrupted):
        pass
    assert not psutil.pid_exists(started[0].pid)


@pytest.mark.parametrize(
    ("number", "module"),
    [
        (signal.SIGINT, "client_train"),
        (signal.SIGHUP, "client_train"),
        (signal.SIGTERM, "fedprllm.federation.site.worker"),
    ],
)
def test_an_interrupted_rehearsal_ends_every_process(given, tmp_path, number, module):
    folder = tmp_path / "rehearsal"
    rehearsing = rehearse(folder, *given[2], "--windows", "80")
    wait_until(lambda: is_part_of(folder, module), module)
    rehearsing.send_signal(number)
    assert "every process has ended" in finish(rehearsing, expected=130)
    assert not processes_of(folder)


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "kits").mkdir()
    (tmp_path / "kits" / "federation.json").touch()
    with pytest.raises(ConfigError, match="not created by a rehearsal"):
        empty_folder(tmp_path)
    assert (tmp_path / "kits" / "federation.json").exists()
    again = empty_folder(tmp_path / "new")
    (again / "run").mkdir()
    assert sorted(path.name for path in empty_folder(again).iterdir()) == [".rehearsal"]


def test_a_rehearsal_under_masks_gives_the_same_model_and_the_server_sees_no_mask(small_model, tmp_path):
    """Real processes, real certificates, the real engine; private signing keys stay in their kits."""
    names = ["north", "south", "west"]
    paths = {f"site-{n}": path for n, path in enumerate(texts(tmp_path, names).values(), 1)}
    words = [word for path in paths.values() for word in ("--data", path)]
    folder = tmp_path / "rehearsal"
    options = ["--secure", "--participants", "3", "--model", str(small_model), "--keep-kits", "--heal", "2"]
    output = finish(rehearse(folder, *options, *words, *QUICK))
    assert output.count("the same model") == 6, "pruned and healed, at three participants"
    assert "in the sum only" in output
    assert "of 2 rounds" in output
    with torch_threads(1):
        expected = prune(
            small_model, paths, PruneConfig(windows=2, window_length=32), out=tmp_path / "in-the-clear"
        )
    same_model(folder / "run" / "model", expected.model_dir)
    with torch_threads(1):
        options = HealConfig(rounds=2, windows=2, window_length=32)
        healed = heal(expected.model_dir, paths, options, out=tmp_path / "healed-in-the-clear")
    same_model(folder / "run-healed" / "model", healed.model_dir)
    for name in paths:
        lines = read_ledger(folder / "ledgers" / f"{name}.jsonl")
        assert {line["kind"] for line in lines if line["direction"] == "sent"} == {"masked"}
        assert not list((folder / "kits" / name).rglob("secure/*.step")), "keys are gone at the end"
    keys = {name: (folder / "kits" / name / "local" / "signing.key").read_bytes() for name in paths}
    assert len(set(keys.values())) == 3
    for name, key in keys.items():
        elsewhere = [path for path in folder.rglob("*") if path.is_file() and name not in path.parts]
        assert len(elsewhere) > 20
        for path in elsewhere:
            content = path.read_bytes()
            assert key not in content, f"the signing key of {name} is in {path}"
            assert key.hex().encode() not in content, f"the signing key of {name} is in {path}"
