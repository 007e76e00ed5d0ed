"""Signing keys and rosters on the command line: made, collected, compared, pinned."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedprllm.cli import roster as module
from fedprllm.errors import ConfigError, SecureError
from fedprllm.federation.flare import configuration
from fedprllm.federation.site.masking import pinned_roster, signing_key

NAMES = ["north", "south", "west"]


@pytest.fixture
def kits(tmp_path: Path, monkeypatch) -> dict[str, Path]:
    """Folders of identities; only their names are needed here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configuration, "participant_name", lambda kit: kit.name)
    folders = {name: tmp_path / "kits" / name for name in NAMES}
    for folder in folders.values():
        folder.mkdir(parents=True)
    return folders


def roster(*words: object) -> str:
    done = CliRunner().invoke(module.app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def collected(kits: dict[str, Path]) -> str:
    for kit in kits.values():
        roster("key", kit)
    return roster("collect", *(f"{name}.signing" for name in kits))


def fingerprint_in(said: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith("fingerprint")]
    return line.removeprefix("fingerprint").strip()


def test_everybody_pins_the_same_roster(kits) -> None:
    fingerprint = fingerprint_in(collected(kits))
    for kit in kits.values():
        said = roster("pin", kit, "roster.json", "--fingerprint", fingerprint)
        assert "3 participants" in said
        assert fingerprint_in(roster("show", kit)) == fingerprint
    pinned = [pinned_roster(kit / "local") for kit in kits.values()]
    assert all(one == pinned[0] for one in pinned)
    assert sorted(pinned[0].keys) == NAMES


def test_a_signing_key_is_made_once_and_readable_by_its_owner_only(kits) -> None:
    kit = kits["north"]
    roster("key", kit)
    first = signing_key(kit / "local").private_bytes_raw()
    roster("key", kit)
    assert signing_key(kit / "local").private_bytes_raw() == first
    assert stat.S_IMODE((kit / "local" / "signing.key").stat().st_mode) == 0o600
    assert first.hex() not in Path("north.signing").read_text()


def test_a_roster_with_another_key_or_fingerprint_is_not_pinned(kits) -> None:
    fingerprint = fingerprint_in(collected(kits))
    wrong = " ".join(reversed(fingerprint.split()))
    with pytest.raises(ConfigError, match="and you were told"):
        roster("pin", kits["north"], "roster.json", "--fingerprint", wrong)
    keys = json.loads(Path("roster.json").read_text())
    keys["north"], keys["south"] = keys["south"], keys["north"]
    Path("swapped.json").write_text(json.dumps(keys))
    with pytest.raises(ConfigError, match="holds another key for 'north' than your own"):
        roster("pin", kits["north"], "swapped.json", "--yes")
    with pytest.raises(SecureError, match="no roster is pinned"):
        roster("show", kits["north"])


@pytest.mark.parametrize(
    "content", ["", "[]", '{"name": "a"}', '{"name": "a", "key": "00"}', '{"name": 1, "key": ""}']
)
def test_a_file_that_holds_no_key_is_refused(kits, content: str) -> None:
    Path("bad.signing").write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.signing"):
        roster("collect", "bad.signing")


def test_a_participant_that_is_named_twice_is_refused(kits) -> None:
    roster("key", kits["north"])
    with pytest.raises(ConfigError, match="'north' is named twice"):
        roster("collect", "north.signing", "north.signing")
