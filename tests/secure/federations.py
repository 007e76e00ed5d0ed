"""Federations under masks without a network: real sites and a roster that all have pinned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedprllm.federation.site.masking import pin_roster, signing_key
from fedprllm.federation.site.site import Site, settings_path
from fedprllm.secure.terms import Roster
from tests.federation_helpers import Local, make_site


def pin_for_all(kits: dict[str, Path]) -> Roster:
    """Make every participant's signing key, and pin the same roster everywhere."""
    keys = {
        name: signing_key(kit / "local", make=True).public_key().public_bytes_raw()
        for name, kit in kits.items()
    }
    roster = Roster(keys)
    for kit in kits.values():
        pin_roster(kit / "local", roster)
    return roster


def secure_sites(folder: Path, paths: dict[str, str], model: Path, **settings: Any) -> dict[str, Site]:
    """Sites of participants that have pinned each other."""
    sites = {
        name: make_site(folder, name, path, model, threads=1, require_secure=True, **settings)
        for name, path in paths.items()
    }
    pin_for_all({name: settings_path(folder / name).parents[1] for name in sites})
    return sites


def local(sites: dict[str, Site]) -> Local:
    """A channel to them."""
    return Local(sites)
