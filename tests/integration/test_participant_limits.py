"""What a run may ask of a participant: its limits, its own windows, and its yes before any computation."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from fedprllm import ConfigError, PruneConfig
from fedprllm.federation.coordinator import rounds as coordinator_module
from fedprllm.federation.plan import SiteSettings
from fedprllm.federation.protocol.messages import read_reply
from fedprllm.federation.site import worker
from fedprllm.federation.site.consent import (
    Refused,
    TextBudget,
    answer,
    check_request,
    open_questions,
    own_seed,
    text_identity,
)
from fedprllm.federation.site.site import settings_path, work_folder
from fedprllm.files import read_json
from tests.federation_helpers import (
    Local,
    conduct,
    make_plan,
    make_site,
    texts,
    threads,  # noqa: F401  a fixture
)
from tests.integration.test_federation_local import events, outcome
from tests.isolation import torch_threads

pytestmark = [pytest.mark.usefixtures("threads")]
NAMES = ["north", "south", "west"]
# The defaults of every limit; the texts of these tests are too short for them.
DEFAULTS = {
    name: SiteSettings.model_fields[name].default
    for name in ("min_windows", "min_tokens", "min_participants", "runs_per_text", "seed")
}


@pytest.fixture
def model(small_model):
    return small_model


@pytest.fixture
def sites(tmp_path, model, monkeypatch):
    """``sites(**settings)``: a channel to three participants, each with these settings."""
    opened = []
    monkeypatch.setattr(coordinator_module, "_POLL_S", 0.01)

    def make(names=NAMES, **settings):
        paths = texts(tmp_path / "texts")
        channel = Local(
            {name: make_site(tmp_path, name, paths[name], model, threads=1, **settings) for name in names}
        )
        opened.extend(channel.sites.values())
        return channel

    with torch_threads(1):
        yield make
        for site in opened:
            site.close()


def messages(folder: Path) -> list[str]:
    """What participants were told, those of them that a run got to before it ended."""
    paths = [path for name in NAMES for path in work_folder(folder / name).glob("runs/*/status.json")]
    return [message for path in paths if (message := read_json(path)["message"])]


def refusals(folder: Path) -> set[str]:
    return {event["reason"] for event in events(folder) if event["event"] == "left out"}


def assert_nothing_was_computed(folder: Path, channel: Local) -> None:
    for name in channel.sites:
        home = work_folder(folder / name)
        assert not list(home.glob("runs/*/updates/*"))
        assert not list(home.glob("runs/*/state/*"))
        assert not (home / "ledger.jsonl").exists()
    assert all(not len(read_reply(message)[1]) for _, message in channel.sent)


def test_tokens_cannot_be_read_off_the_masks_of_one_window(tmp_path, model, sites):
    """One participant, one window, two tokens: its mask would name the token (measured: 5 of 5)."""
    channel = sites(**DEFAULTS)
    prune = {"windows": 1, "window_length": 2, "bos": "every"}
    plan = make_plan(model, prune=prune, participants=["south"], quorum=1)
    assert conduct(tmp_path, plan, channel, NAMES) == "quorum lost", outcome(tmp_path)
    assert refusals(tmp_path) == {"failed: too few participants"}
    assert_nothing_was_computed(tmp_path, channel)


def test_one_short_window_is_refused_however_many_take_part(tmp_path, model, sites):
    channel = sites(**DEFAULTS)
    plan = make_plan(model, prune={"windows": 1, "window_length": 2})
    assert conduct(tmp_path, plan, channel) == "quorum lost"
    assert refusals(tmp_path) == {"failed: too few tokens"}
    assert_nothing_was_computed(tmp_path, channel)
    message = messages(tmp_path)[0]
    assert "the run asks for 1 windows with 2 tokens in all" in message
    assert "16 windows and 8,192 tokens" in message


@pytest.mark.parametrize("share", ["mask", "statistics"])
def test_a_text_that_gives_too_little_is_refused_too(tmp_path, model, sites, share):
    """All of the text is asked for, and it is short: only the participant can know."""
    channel = sites(min_windows=16, min_tokens=100_000, allow=["mask", "statistics"])
    plan = make_plan(model, prune={"windows": 0, "share": share})
    assert conduct(tmp_path, plan, channel) == "quorum lost"
    assert refusals(tmp_path) == {"failed: too few tokens"}
    assert_nothing_was_computed(tmp_path, channel)
    assert "the text gives" in messages(tmp_path)[0]


def test_a_text_is_used_in_as_many_runs_as_are_granted(tmp_path, model, sites):
    channel = sites(runs_per_text=2)
    for number in (1, 2):
        assert conduct(tmp_path / f"run-{number}", make_plan(model), channel) == "complete"
    assert conduct(tmp_path / "run-3", make_plan(model), channel) == "quorum lost"
    assert refusals(tmp_path / "run-3") == {"failed: text used up"}


def test_the_budget_knows_a_text_by_its_content(tmp_path):
    budget = TextBudget(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "c.txt").write_text("two")
    one, same, other = (text_identity([str(tmp_path / f"{name}.txt")]) for name in "abc")
    assert one == same != other
    assert [budget.spend(one, run, 2) for run in ("r1", "r1", "r2", "r1")] == [1, 1, 2, 2]
    with pytest.raises(Refused, match="used in 2 runs, and 2 are granted"):
        budget.spend(same, "r3", 2)
    assert budget.spend(other, "r3", 2) == 1
    assert TextBudget(tmp_path).spend(same, "r2", 2) == 2


def test_windows_are_the_participants_own_choice(tmp_path, model, sites):
    """No seed of a coordinator moves them, and two participants with one text choose apart."""
    fingerprints = []
    for seed in (0, 7):
        channel = sites(seed=None)
        folder = tmp_path / f"seed-{seed}"
        assert conduct(folder, make_plan(model, prune={"seed": seed}), channel) == "complete"
        fingerprints.append(
            [
                {
                    read_json(path)["fingerprint"]
                    for path in work_folder(tmp_path / name).glob("runs/*/text.json")
                }
                for name in NAMES
            ]
        )
    assert fingerprints[0] == fingerprints[1]
    assert all(len(own) == 1 for own in fingerprints[1])
    assert own_seed(work_folder(tmp_path / "north")) != own_seed(work_folder(tmp_path / "south"))
    assert (work_folder(tmp_path / "north") / "windows-seed").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prune": {"sparsity": 0.7}}, "sparsity 0.7, and this participant's plan (--config) has 0.5"),
        ({"prune": {"windows": 1}}, "windows 1, and this participant's plan (--config) has 2"),
        ({"participants": ["north", "south"]}, "has the participants north, south"),
    ],
)
def test_another_run_than_the_pinned_one_is_refused(tmp_path, model, sites, change, words):
    plan = make_plan(model, participants=NAMES)
    pinned = {
        "model": plan.model,
        "config": plan.config.model_dump(mode="json"),
        "participants": plan.participants,
    }
    channel = sites(plan=pinned)
    other = make_plan(model, **{"participants": NAMES, **change})
    assert conduct(tmp_path / "other", other, channel) == "quorum lost"
    assert refusals(tmp_path / "other") == {"failed: another plan"}
    assert words in messages(tmp_path)[0]
    assert_nothing_was_computed(tmp_path, channel)
    assert conduct(tmp_path / "same", plan, channel) == "complete", outcome(tmp_path / "same")


def answering(folder: Path, yes: bool, seen: list) -> threading.Thread:
    """Answers the question of every participant, as its terminal does."""

    def wait() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and len(seen) < len(NAMES):
            for name in NAMES:
                for run, question in open_questions(work_folder(folder / name) / "runs"):
                    assert not list(run.glob("updates/*")), "computed before the answer"
                    seen.append(question)
                    answer(run, yes)
            time.sleep(0.05)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_nothing_is_computed_before_the_participant_agrees(tmp_path, model, sites):
    channel, seen = sites(confirm=True), []
    thread = answering(tmp_path, True, seen)
    assert conduct(tmp_path, make_plan(model), channel) == "complete", outcome(tmp_path)
    thread.join(60)
    lines = {name: dict(question["lines"]) for name, question in zip(NAMES, seen, strict=True)}
    for told in lines.values():
        assert told["participants"] == "north, south, west"
        assert "2 windows of 32 tokens (64 tokens)" in told["computed from"]
        assert told["you send"].startswith("prune masks: One bit")
        assert "used in 1 of 99 runs" in told["your text"]
        assert "birds" not in str(told)


def test_a_no_ends_the_participants_part(tmp_path, model, sites):
    channel, seen = sites(confirm=True), []
    thread = answering(tmp_path, False, seen)
    assert conduct(tmp_path, make_plan(model), channel) == "quorum lost"
    thread.join(60)
    assert refusals(tmp_path) == {"failed: not confirmed"}
    assert_nothing_was_computed(tmp_path, channel)
    assert not list(tmp_path.glob("*/fedprllm/texts.json")), "a run that was declined is not counted"


def test_changed_text_is_not_mixed_into_a_run(tmp_path, model, sites):
    channel = sites()
    assert conduct(tmp_path, make_plan(model), channel) == "complete", outcome(tmp_path)
    site = channel.sites["north"]
    text = Path(site.settings.data[0])
    text.write_text(text.read_text().replace("birds", "stones"))
    (run,) = site.folder.glob("runs/*")
    (run / "owner").write_text("again")
    # The run goes on at this participant, as after its process was killed.
    assert worker.main([str(run), str(settings_path(tmp_path / "north")), "north", "again"]) == 1
    status = read_json(run / "status.json")
    assert (status["state"], status["code"]) == ("failed", "data")
    assert "has changed since this run began" in status["message"]
    assert not list(run.glob("updates/*"))


def test_a_word_that_is_no_kind_is_refused_when_it_is_written():
    with pytest.raises(ConfigError, match="allow: unknown kind of update 'masks'; did you mean 'mask'"):
        SiteSettings(data=["x"], allow=["masks"])


def test_a_request_without_participants_counts_as_too_few():
    settings = SiteSettings(data=["x"])
    job = {"participants": ["a", "a", "a"], "config": {"windows": 16, "window_length": 2048}, "model": "m"}
    with pytest.raises(Refused, match="names 1 participants"):
        check_request(settings, job)


def test_a_participant_that_requires_masks_refuses_a_run_in_the_clear():
    settings = SiteSettings(data=["x"], require_secure=True)
    job = {"participants": ["a", "b", "c"], "config": PruneConfig().model_dump(), "model": "m"}
    with pytest.raises(Refused, match="shares sums only") as refusal:
        check_request(settings, job)
    assert refusal.value.code == "not secure"
    job["config"] = PruneConfig(secure=True, window_length=2048).model_dump()
    check_request(settings, job)
