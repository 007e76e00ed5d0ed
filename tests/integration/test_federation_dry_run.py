"""What a participant can inspect: each update before it leaves, and the ledger afterwards."""

from __future__ import annotations

import hashlib
import re

import pytest
import typer
from typer.testing import CliRunner

from fedprllm import ConfigError
from fedprllm.cli.participant import ledger, participate
from fedprllm.federation.plan import RunPlan, SiteSettings
from fedprllm.federation.site.dry_run import dry_run
from fedprllm.federation.site.spool import append_ledger
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.sharing import SHARING
from fedprllm.sharing.as_words import masked_bytes
from tests.federation_helpers import texts
from tests.secure.federations import pin_for_all

app = typer.Typer()
app.command("participate")(participate)
app.command("ledger")(ledger)


@pytest.fixture
def model(small_model):
    return small_model


@pytest.fixture
def text(tmp_path):
    return texts(tmp_path)["north"]


@pytest.mark.parametrize("share", ["mask", "statistics", "gram", "weights"])
def test_a_dry_run_shows_every_tensor_of_every_kind(model, text, share):
    prune = {"windows": 2, "window_length": 32, "share": share}
    plan = RunPlan(name="run", model=str(model), prune=prune)
    previews = list(dry_run(SiteSettings(data=[text], allow=[share]), plan, "north", n_blocks=2))
    assert [preview.block for preview in previews] == [0, 1]
    for preview in previews:
        assert (preview.kind, preview.n_tokens, preview.n_blocks) == (share, 64, 5)
        payload = sum(tensor.payload_bytes for tensor in preview.tensors)
        assert payload < preview.message_bytes < payload + 2000
        assert all(tensor.rows for tensor in preview.tensors)


@pytest.mark.parametrize("share", ["mask", "statistics", "gram", "weights"])
def test_a_dry_run_under_masks_shows_the_words_that_leave_and_what_they_hide(model, text, share):
    settings = SiteSettings(data=[text], allow=[share], require_secure=True)
    prune = {"windows": 2, "window_length": 32, "share": share}
    plain = RunPlan(name="run", model=str(model), prune=prune)
    with pytest.raises(ConfigError, match="the plan needs secure = true"):
        next(dry_run(settings, plain, "north"))
    (clear,) = dry_run(SiteSettings(data=[text], allow=[share]), plain, "north")
    plan = RunPlan(name="run", model=str(model), prune={**prune, "secure": True})
    (one,), (other,) = (list(dry_run(settings, plan, "north", n_participants=5)) for _ in range(2))
    assert (one.kind, one.n_tokens, [tensor.name for tensor in one.tensors]) == ("masked", 0, ["words"])
    assert one.tensors[0].rows != other.tensors[0].rows
    names = {tensor.name for tensor in one.hidden}
    assert one.hidden == [tensor for tensor in clear.tensors if tensor.name in names]
    assert names == {tensor.name for tensor in clear.tensors if share != "weights" or ".mask" in tensor.name}
    linears = BlockwiseModel(model).linears[0]
    assert one.tensors[0].payload_bytes == masked_bytes(SHARING[share], linears, 5)
    assert one.message_bytes == other.message_bytes


def test_the_command_shows_both_and_counts_the_pinned_roster(model, text, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        f'name = "r"\nmodel = "{model}"\n[prune]\nwindows = 2\nwindow_length = 32\nsecure = true\n'
    )
    kit = tmp_path / "north"
    pin_for_all({name: tmp_path / name for name in ("north", "south", "west", "east")})
    arguments = ["participate", str(kit), "--data", text, "--dry-run", "--config", str(config)]
    output = " ".join(CliRunner().invoke(app, arguments, catch_exceptions=False).output.split())
    assert "what is hidden, and stays on this machine" in output
    assert "masked, as sent; room for 4 participants" in output
    assert "nothing was sent" in output
    plain = config.read_text().replace("secure = true", "")
    config.write_text(plain)
    with pytest.raises(ConfigError, match="secure = true"):
        CliRunner().invoke(app, [*arguments, "--require-secure"], catch_exceptions=False)


def test_a_dry_run_opens_no_connection_and_leaves_no_ledger(model, text, tmp_path, monkeypatch):
    import socket

    def refused(*_):
        raise AssertionError("a dry run must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    kit = tmp_path / "north"
    config = tmp_path / "config.toml"
    config.write_text(f'name = "r"\nmodel = "{model}"\n[prune]\nwindows = 2\nwindow_length = 32\n')
    arguments = ["participate", str(kit), "--data", text, "--dry-run", "--config", str(config)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "nothing was sent" in result.output
    assert "#" in result.output
    assert not kit.exists()


def test_a_dry_run_needs_a_model_and_text(text, tmp_path):
    for arguments in ([str(tmp_path), "--dry-run", "--data", text], [str(tmp_path), "--dry-run"]):
        with pytest.raises(ConfigError):
            CliRunner().invoke(app, ["participate", *arguments], catch_exceptions=False)


def test_the_ledger_is_shown(tmp_path):
    summary = {"kind": "mask", "n_tokens": 64, "shapes": {"w": [2, 3], "v": [1, 1]}}
    for block in range(2):
        append_ledger(tmp_path / "fedprllm" / "ledger.jsonl", "ab" * 16, block, summary, b"x" * 1234)
    digest = hashlib.sha256(b"x" * 1234).hexdigest()[:8]
    result = CliRunner().invoke(app, ["ledger", str(tmp_path)], catch_exceptions=False, env={"COLUMNS": "80"})
    assert "2 updates, 2,468 bytes" in result.output
    assert len(re.findall(rf"\d\d:\d\d sent .*abababab .*mask .* 1,234 +{digest}", result.output)) == 2
    result = CliRunner().invoke(app, ["ledger", str(tmp_path), "--json"], catch_exceptions=False)
    assert '"block": 1' in result.output


def test_missing_text_or_model_is_refused_before_connecting(model, text, tmp_path):
    pytest.importorskip("nvflare")
    kit = str(tmp_path / "north")
    for options, complaint in [
        (["--data", f"{text}.gone"], "there is no text at"),
        (["--data", text, "--model", str(tmp_path / "gone")], "there is no model at"),
        (["--data", text, "--model", str(tmp_path)], "expected a Hugging Face folder"),
    ]:
        with pytest.raises(ConfigError, match=complaint):
            CliRunner().invoke(app, ["participate", kit, *options], catch_exceptions=False)


@pytest.mark.parametrize("secure", [False, True])
def test_a_dry_run_of_healing_shows_the_first_round(model, text, secure):
    heal = {"rounds": 5, "windows": 4, "window_length": 32, "secure": secure}
    plan = RunPlan(name="run", model=str(model), heal=heal)
    with pytest.raises(ConfigError, match="the run asks for gradients, and mask may be sent"):
        next(dry_run(SiteSettings(data=[text]), plan, "north"))
    settings = SiteSettings(data=[text], allow=["gradients"])
    (preview,) = dry_run(settings, plan, "north", n_blocks=3)
    kind, n_tokens = ("masked", 0) if secure else ("gradients", 31)
    assert (preview.kind, preview.n_tokens, preview.step, preview.n_blocks) == (kind, n_tokens, "round", 6)
    assert [(tensor.name, tensor.shape) for tensor in preview.tensors] == [("words", (3708,))]
    assert bool(preview.hidden) == secure
    if secure:
        assert preview.hidden[0].rows != preview.tensors[0].rows
