"""FLARE's side of fetching results: participants ask the server's process, outside of any job.

A participant can therefore fetch a result long after the run, without the coordinator's doing anything.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message

from fedprllm.federation.coordinator.results import ResultServer
from fedprllm.federation.flare.contact import Contact, is_connected, note_sites
from fedprllm.federation.flare.controller import RUNS
from fedprllm.federation.flare.policy import RESULT_CHANNEL, RESULT_TOPIC, Party, party, root
from fedprllm.federation.site.results import Collector, Unreachable, wake_path
from fedprllm.federation.site.site import settings_path, work_folder

__all__ = ["exchange_results"]

_TIMEOUT_S = 30.0  # without any progress of the transfer
_FIRST_TIMEOUT_S = 3.0  # there may be no connection yet, and then no answer comes
_LOOK_S = 0.5
_RETRY_S = 2.0
_ASK_S = 60.0  # between two questions if no run has just ended

log = logging.getLogger(__name__)


def exchange_results(cell: Any, kit: Path) -> None:
    """Serve results if this is the server's process, and collect them if it is a site's.

    Args:
        cell: FLARE's end point of this process (a `Cell`).
        kit: The kit that the process was started with.
    """
    kind = party(str(cell.core_cell.my_info.fqcn))
    if kind is Party.SERVER:
        _serve(cell, kit)
    elif kind is Party.SITE:
        threading.Thread(target=_collect, args=(cell, kit), name="results", daemon=True).start()


def _serve(cell: Any, kit: Path) -> None:
    server = ResultServer(kit / RUNS)
    threading.Thread(target=note_sites, args=(cell.core_cell, kit), name="contact", daemon=True).start()

    def answer(request: Message) -> Message:
        name = root(str(request.get_header(MessageHeaderKey.ORIGIN)))
        payload = request.payload
        if not isinstance(payload, bytes | bytearray | memoryview):
            return make_reply(ReturnCode.INVALID_REQUEST)
        return make_reply(ReturnCode.OK, body=server.answer(name, bytes(payload)))

    cell.register_request_cb(channel=RESULT_CHANNEL, topic=RESULT_TOPIC, cb=answer)


def _collect(cell: Any, kit: Path) -> None:
    """Collect results at once, whenever a run has ended, and now and then."""

    timeout_s = _FIRST_TIMEOUT_S

    def ask(message: bytes) -> bytes:
        nonlocal timeout_s
        reply = cell.send_request(
            channel=RESULT_CHANNEL,  # FLARE streams long messages only if the channel is named
            topic=RESULT_TOPIC,
            target="server",
            request=Message({}, message),
            timeout=timeout_s,
        )
        code = reply.get_header(MessageHeaderKey.RETURN_CODE)
        if code != ReturnCode.OK or not isinstance(reply.payload, bytes | bytearray | memoryview):
            contact.note(made=False)
            raise Unreachable(str(code))
        contact.note(made=True)
        timeout_s = _TIMEOUT_S
        return bytes(reply.payload)

    home = work_folder(kit)
    contact = Contact(home)
    collector = Collector(ask, settings_path(kit), home, kit / RUNS)
    wake = wake_path(home)
    while True:
        called = _changed(wake)
        pause_s = _RETRY_S
        try:
            collector.collect()
            pause_s = _ASK_S
        except Unreachable as error:
            log.info("the server does not answer about results yet: %s", error)
        except Exception as error:  # noqa: BLE001  FLARE raises anything before it has connected
            log.warning("results could not be collected: %s: %s", type(error).__name__, error)
        end = time.monotonic() + pause_s
        while time.monotonic() < end and _changed(wake) == called:
            if contact.is_made and not is_connected(cell.core_cell):
                contact.note(made=False)
                end = time.monotonic() + _RETRY_S
            time.sleep(_LOOK_S)


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
