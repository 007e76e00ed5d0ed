"""Fetching results and having the pruned model built, independent of the transport.

KIT/fedprllm/results/RUN-ID/
  manifest.json         digests of everything that belongs to the result
  block-0007.decision   the coordinator's decision about a block; deleted once the model is built
  outcome.json          what became of the result, written by `fedprllm.federation.site.build`
  status.json           progress, for display
  build.log             log of the process that builds the model; never sent
KIT/fedprllm/results/offers.json   the results that the server had when it was asked last

KIT/runs/NAME/ (or OUT/NAME/)
  model/                the pruned model
  result.json           run, digest, and the share of zeros
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedprllm.errors import FedprllmError, RunError, UpdateError
from fedprllm.federation.plan import SiteSettings
from fedprllm.federation.protocol.messages import pack
from fedprllm.federation.protocol.results import (
    Manifest,
    Offer,
    ResultRequest,
    read_manifest,
    read_offers,
    read_result_reply,
)
from fedprllm.federation.site.build import MANIFEST, OUTCOME
from fedprllm.federation.site.process import start_python
from fedprllm.federation.site.spool import LEDGER, append_ledger
from fedprllm.files import read_json, write_bytes, write_json

__all__ = ["Collector", "Unreachable", "results_folder", "wake_path"]

# Outcomes that a participant's next visit cannot change.
_FINAL = ("received", "declined")


class Unreachable(Exception):  # noqa: N818
    """The server did not answer. It is asked again later."""


def results_folder(home: Path) -> Path:
    """Folder with everything fetched.

    Args:
        home: The participant's folder with its ledger.
    """
    return home / "results"


def wake_path(home: Path) -> Path:
    """File that is written whenever a run has ended, so that its result is fetched at once."""
    return results_folder(home) / "wake"


class Collector:
    """Fetches every result that the server has for this participant and that it does not have yet.

    Args:
        ask: Sends a request to the server and returns its reply.
            It raises `Unreachable` if none comes.
        settings_file: The participant's settings.
        home: Its folder with ledger and spools.
        out: Folder for finished models, unless the settings name another.
    """

    def __init__(self, ask: Callable[[bytes], bytes], settings_file: Path, home: Path, out: Path) -> None:
        self._ask_server, self._settings_file, self._home, self._out = ask, settings_file, home, out
        self._given_up: set[str] = set()
        self._record: str | None = None
        self._numbers = itertools.count()

    def collect(self) -> None:
        """Ask for results, and fetch and build those that are new.

        Raises:
            Unreachable: The server did not answer.
        """
        settings = SiteSettings(**read_json(self._settings_file))
        self._record = settings.record
        try:
            _, payload = self._ask(ResultRequest(op="list"))
            offers = read_offers(payload)
        except UpdateError as error:
            print(f"the server's list of results cannot be used: {error}", file=sys.stderr)
            return
        write_json(
            results_folder(self._home) / "offers.json", [offer.model_dump(mode="json") for offer in offers]
        )
        for offer in offers:
            if offer.run not in self._given_up and self._is_wanted(offer, settings.fetch):
                self._take(offer, settings)

    def _is_wanted(self, offer: Offer, only: str | None) -> bool:
        path = self._folder(offer) / "status.json"
        status = read_json(path) if path.exists() else {"state": ""}
        if only is None:
            return status["state"] not in _FINAL
        is_there = status["state"] == "received" and Path(status["model"]).exists()
        return offer.name == only and not is_there

    def _folder(self, offer: Offer) -> Path:
        return results_folder(self._home) / offer.run

    def _take(self, offer: Offer, settings: SiteSettings) -> None:
        if not settings.result:
            self._conclude(offer, {"outcome": "declined", "message": ""}, None, None)
            return
        manifest = out = None
        try:
            manifest = self._fetch(offer)
            out = self._place(offer, settings)
            self._show(offer, "building", manifest)
            outcome = self._build(offer, out)
        except FedprllmError as error:
            outcome = {"outcome": "failed", "message": str(error)}
        self._conclude(offer, outcome, manifest, out)

    def _conclude(
        self, offer: Offer, outcome: dict[str, Any], manifest: Manifest | None, out: Path | None
    ) -> None:
        """Tell the server what became of a result, and only then regard it as settled."""
        known = {name: outcome[name] for name in ("outcome", "digest", "dense", "pruned") if name in outcome}
        if outcome["outcome"] == "received" and manifest is not None and out is not None:
            about = {**offer.model_dump(), "digest": manifest.digest, "sparsity": manifest.sparsity}
            write_json(out / "result.json", about)
        else:
            self._given_up.add(offer.run)
        report = ResultRequest(op="outcome", run=offer.run, **known)
        if report.pruned is not None:
            summary = {"kind": "perplexity", "n_tokens": report.pruned.n_tokens, "shapes": {}}
            append_ledger(self._home / LEDGER, offer.run, None, summary, pack(report))
        self._ask(report)
        model = None if out is None else str(out / "model")
        self._show(offer, outcome["outcome"], manifest, message=outcome["message"], model=model)
        for path in self._folder(offer).glob("*.decision"):
            if outcome["outcome"] == "received":
                path.unlink()

    # Fetching ----------------------------------------------------------------------------------

    def _ask(self, request: ResultRequest) -> tuple[str, memoryview]:
        if self._record is not None:
            path = Path(self._record) / f"{os.getpid()}-{next(self._numbers):06d}.request"
            write_bytes(path, pack(request))
        reply, payload = read_result_reply(self._ask_server(pack(request)))
        return reply.code, payload

    def _receive(self, request: ResultRequest) -> bytes:
        code, payload = self._ask(request)
        if code:
            what = "manifest" if request.op == "manifest" else f"decision about block {request.block}"
            raise UpdateError(f"the server does not give the {what} ({code}): ask the coordinator")
        return bytes(payload)

    def _fetch(self, offer: Offer) -> Manifest:
        """Fetch the manifest and the decisions that are not there yet, each checked by its digest."""
        folder = self._folder(offer)
        data = self._receive(ResultRequest(op="manifest", run=offer.run))
        manifest = read_manifest(data)
        if (manifest.run, manifest.name) != (offer.run, offer.name):
            raise UpdateError(
                f"manifest of run {offer.name}: it names run {manifest.name}; ask the coordinator"
            )
        self._note(offer, None, data)
        write_bytes(folder / MANIFEST, data)
        for block, digest in enumerate(manifest.blocks):
            path = folder / f"block-{block:04d}.decision"
            self._show(offer, "fetching", manifest, n_fetched=block)
            if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
                continue
            data = self._receive(ResultRequest(op="block", run=offer.run, block=block))
            found = hashlib.sha256(data).hexdigest()
            if found != digest:
                raise UpdateError(
                    f"decision about block {block} of run {offer.name}: expected digest {digest[:12]}, found "
                    f"{found[:12]}; fetch it again"
                )
            self._note(offer, block, data)
            write_bytes(path, data)
        return manifest

    def _note(self, offer: Offer, block: int | None, data: bytes) -> None:
        """Record in the ledger what came in."""
        summary: dict[str, Any] = {
            "kind": "manifest" if block is None else "result",
            "n_tokens": 0,
            "shapes": {},
        }
        append_ledger(self._home / LEDGER, offer.run, block, summary, data, received=True)

    def _place(self, offer: Offer, settings: SiteSettings) -> Path:
        """Folder for the model: the run's name, or name and id if another run has that name."""
        parent = self._out if settings.out is None else Path(settings.out)
        for name in (offer.name, f"{offer.name}-{offer.run[:8]}"):
            path = parent / name / ".run-id"
            if not (parent / name).exists():
                write_bytes(path, offer.run.encode())
                return parent / name
            if path.exists() and path.read_text(encoding="utf-8") == offer.run:
                return parent / name
        raise RunError(
            f"{parent / offer.name} exists and is not of this run: rename it, or name another folder with "
            "--out"
        )

    # Building ----------------------------------------------------------------------------------

    def _build(self, offer: Offer, out: Path) -> dict[str, Any]:
        folder = self._folder(offer)
        outcome = folder / OUTCOME
        outcome.unlink(missing_ok=True)
        arguments = [str(folder), str(self._settings_file), str(out)]
        process = start_python("fedprllm.federation.site.build", arguments, folder / "build.log")
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
        if not outcome.exists():
            raise RunError(
                f"building the model ended with status {process.returncode}: see {folder / 'build.log'}"
            )
        found: dict[str, Any] = read_json(outcome)
        return found

    def _show(
        self,
        offer: Offer,
        state: str,
        manifest: Manifest | None,
        *,
        n_fetched: int | None = None,
        message: str = "",
        model: str | None = None,
    ) -> None:
        status = {
            "state": state,
            "run": offer.name,
            "message": message,
            "model": model,
            "n_fetched": n_fetched,
            "n_blocks": None if manifest is None else len(manifest.blocks),
            "sparsity": None if manifest is None else manifest.sparsity,
        }
        write_json(self._folder(offer) / "status.json", status)
