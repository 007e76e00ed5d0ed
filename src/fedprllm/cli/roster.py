"""Whose signatures count in sums under masks: signing keys, and the roster that every participant pins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fedprllm.cli.console import console, need_keys
from fedprllm.cli.identity import compare
from fedprllm.errors import ConfigError, RunError

__all__ = ["app"]

app = typer.Typer(
    name="roster",
    help="Whose signatures count in sums under masks (secure aggregation).",
    no_args_is_help=True,
)
Kit = Annotated[Path, typer.Argument(help="folder of your identity", metavar="FOLDER")]
_KEY = re.compile("[0-9a-f]{64}")


@app.command("key")
def key(kit: Kit) -> None:
    """Make your signing key, and a file with its public part to send to the coordinator."""
    need_keys()
    from fedprllm.federation.flare.configuration import participant_name
    from fedprllm.federation.site.masking import signing_key
    from fedprllm.files import write_json

    name = participant_name(kit)
    public = signing_key(kit / "local", make=True).public_key().public_bytes_raw()
    path = Path(f"{name}.signing")
    write_json(path, {"name": name, "key": public.hex()})
    console.print(f"send         {path} to the coordinator; it holds no secret")
    console.print(f"keep         {escape(str(kit))}: it holds your private signing key", soft_wrap=True)


@app.command("collect")
def collect(
    files: Annotated[list[Path], typer.Argument(help="NAME.signing of every participant", metavar="FILE...")],
    out: Annotated[Path, typer.Option(help="the roster to send to all participants")] = Path("roster.json"),
) -> None:
    """Put the participants' public signing keys into one roster."""
    need_keys()
    from fedprllm.files import write_json

    keys: dict[str, bytes] = {}
    for path in files:
        one = _read(path)
        if set(one) != {"name", "key"} or not isinstance(one["name"], str):
            raise ConfigError(f"{path} is no file of 'fedprllm roster key': ask its sender for it again")
        if one["name"] in keys:
            raise ConfigError(f"{path}: '{one['name']}' is named twice: give one file for each participant")
        keys[one["name"]] = _key_of(path, one["key"])
    write_json(out, {name: keys[name].hex() for name in sorted(keys)})
    _show(keys)
    console.print(f"send         {escape(str(out))} to all participants", soft_wrap=True)


@app.command("pin")
def pin(
    kit: Kit,
    roster: Annotated[Path, typer.Argument(help="roster that the coordinator sent", metavar="ROSTER")],
    fingerprint: Annotated[
        str | None, typer.Option(help="the roster's fingerprint as the others told you")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="pin without comparing the fingerprint")] = False,
) -> None:
    """Accept a roster, after comparing its fingerprint with the other participants by telephone."""
    need_keys()
    from fedprllm.federation.flare.configuration import participant_name
    from fedprllm.federation.site.masking import pin_roster, signing_key
    from fedprllm.secure.terms import Roster

    keys = {name: _key_of(roster, digits) for name, digits in _read(roster).items()}
    name = participant_name(kit)
    own = signing_key(kit / "local").public_key().public_bytes_raw()
    if keys.get(name) != own:
        raise ConfigError(
            f"{roster} holds another key for '{name}' than your own: send the coordinator yours"
        )
    _show(keys)
    compare(
        Roster(keys).fingerprint,
        fingerprint,
        "Do the other participants read out the same groups and the same names?",
        agreed=yes,
    )
    pin_roster(kit / "local", Roster(keys))
    console.print(f"pinned       {len(keys)} participants; only their signatures count from now on")


@app.command("show")
def show(kit: Kit) -> None:
    """Show the pinned roster."""
    need_keys()
    from fedprllm.federation.site.masking import pinned_roster

    _show(dict(pinned_roster(kit / "local").keys))


def _show(keys: dict[str, bytes]) -> None:
    from fedprllm.secure.terms import Roster

    console.print(f"participants {escape(', '.join(sorted(keys)))}", soft_wrap=True)
    console.print(f"fingerprint  {Roster(keys).fingerprint}", highlight=False, soft_wrap=True)


def _read(path: Path) -> dict[str, Any]:
    from fedprllm.files import read_json

    try:
        found = read_json(path)
    except (OSError, ValueError, RunError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected names and keys, found something else")
    return found


def _key_of(path: Path, digits: Any) -> bytes:
    if not isinstance(digits, str) or _KEY.fullmatch(digits) is None:
        raise ConfigError(f"{path}: expected public keys of 64 hexadecimal digits, found something else")
    return bytes.fromhex(digits)
