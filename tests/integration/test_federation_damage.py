"""Every file of a federated run, at the coordinator and at a site, is made again or named when damaged."""

from __future__ import annotations

import shutil
import warnings
from itertools import cycle
from pathlib import Path

import pytest

from fedprllm.errors import FedprllmWarning
from fedprllm.federation.coordinator import rounds as coordinator_module
from fedprllm.federation.site import computation
from fedprllm.federation.site.consent import TextBudget, own_seed
from fedprllm.federation.site.spool import Spool
from fedprllm.files import read_json
from tests.federation_helpers import (
    Local,
    conduct,
    make_plan,
    make_site,
    same_model,
    texts,
    threads,  # noqa: F401  a fixture
)
from tests.integration.test_damage import DAMAGES, stopped

pytestmark = [pytest.mark.usefixtures("threads")]
NAMES = ["north", "south"]
# The site's own settings are part of its kit; what it sent must never be forgotten; logs are only read.
NOT_OF_THE_RUN = {"fedprllm.json", "ledger.jsonl", "worker.log", ".lock", ".texts.lock"}


class Federation:
    """A coordinator and two sites in a folder that can be copied and continued."""

    def __init__(self, folder: Path, model: Path, paths: dict[str, str], **prune: object) -> None:
        self.folder, self._model, self._paths = folder, model, paths
        self._prune = {"windows": 1, "window_length": 16, **prune}

    def conduct(self) -> str:
        sites = {
            name: make_site(self.folder, name, self._paths[name], self._model, threads=1, seed=None)
            for name in NAMES
        }
        try:
            plan = make_plan(self._model, prune=self._prune, quorum=1)
            return conduct(self.folder, plan, Local(sites), NAMES)
        finally:
            for site in sites.values():
                site.close()

    def copy(self, folder: Path) -> Federation:
        shutil.copytree(self.folder, folder)
        return Federation(folder, self._model, self._paths, **self._prune)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "run"

    def files(self) -> list[Path]:
        places = [self.run, self.folder / "north" / "fedprllm"]
        found = sorted(path for place in places for path in place.rglob("*") if path.is_file())
        return [path.relative_to(self.folder) for path in found if path.name not in NOT_OF_THE_RUN]

    def said(self) -> str:
        """Everything that anyone was told: the outcome, events, and the participant's own status."""
        paths = [*self.run.glob("federation/*.json*"), *self.folder.glob("*/fedprllm/runs/*/status.json")]
        return " ".join(path.read_text(errors="replace") for path in paths)


@pytest.fixture
def paths(tmp_path, monkeypatch) -> dict[str, str]:
    monkeypatch.setattr(coordinator_module, "_POLL_S", 0.002)
    monkeypatch.setattr(computation, "_DECISION_POLL_S", 0.002)
    return texts(tmp_path / "texts", NAMES)


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_every_file_of_a_stopped_run(tmp_path, small_model, paths, strategy) -> None:
    begun = Federation(tmp_path / "begun", small_model, paths, strategy=strategy)
    stopped(begun.conduct)
    undisturbed = begun.copy(tmp_path / "undisturbed")
    assert undisturbed.conduct() == "complete"
    files = begun.files()
    if strategy == "one-shot":  # where the coordinator holds updates, and a site has nothing else to do
        files = [name for name in files if name.parts[0] == "runs"]
    assert len(files) > 15
    n_named = 0
    for name, damage in zip(files, cycle(DAMAGES), strict=False):
        one = begun.copy(tmp_path / "damaged")
        DAMAGES[damage](one.folder / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FedprllmWarning)
            outcome = one.conduct()
        if outcome == "complete" and "left out" not in one.said():
            same_model(one.run / "model", undisturbed.run / "model")
        else:
            assert name.name in one.said(), (name, damage, outcome, one.said())
            n_named += 1
        shutil.rmtree(one.folder)
    assert n_named <= 3, "only what tells one run from another cannot be made again"


def test_a_finished_run_is_checked(tmp_path, small_model, paths) -> None:
    federation = Federation(tmp_path / "federation", small_model, paths)
    assert federation.conduct() == "complete"
    assert federation.conduct() == "complete"
    shard = sorted((federation.run / "model").glob("*.safetensors"))[1]
    DAMAGES["bit"](shard)
    assert federation.conduct() == "error"
    assert f"{shard} is damaged" in read_json(federation.run / "federation" / "outcome.json")["reason"]


@pytest.mark.parametrize("damage", ["empty", "cut", "bit"])
def test_an_update_is_never_sent_damaged(tmp_path, damage) -> None:
    spool = Spool(tmp_path)
    for block in range(2):
        spool.keep_update(block, b"message" * 100, {"kind": "mask", "n_tokens": 4, "shapes": {}})
    DAMAGES[damage](spool.update_path(0))
    assert spool.update(0) is None
    assert spool.drop_damaged() == ["block-0000.json", "block-0000.update"]
    assert spool.update(1) is not None
    assert spool.n_ready == 0


@pytest.mark.parametrize("damage", ["empty", "cut", "bit"])
def test_what_a_participant_counts_is_named_when_damaged(tmp_path, damage) -> None:
    from fedprllm import RunError

    budget = TextBudget(tmp_path)
    budget.spend("text", "run", 2)
    DAMAGES[damage](tmp_path / "texts.json")
    with pytest.raises(RunError, match=r"texts\.json is damaged.*restore it"):
        budget.spend("text", "other", 2)
    own_seed(tmp_path)
    DAMAGES[damage](tmp_path / "windows-seed")
    with pytest.raises(RunError, match=r"windows-seed is damaged.*restore it"):
        own_seed(tmp_path)
