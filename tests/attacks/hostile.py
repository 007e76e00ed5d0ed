"""``hostile.py MODULE ARGUMENTS``: a FLARE process without the guard that sends whatever it is ordered to.

It reads orders from standard input, one JSON object per line, and answers each with a line that starts with
``ANSWER``. It represents a participant or a server that runs arbitrary software with its own valid kit.
"""

from __future__ import annotations

import json
import runpy
import sys
import threading
import time

from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.sfm.conn_manager import NullConnection
from nvflare.private.admin_defs import Message as Order

from fedprllm.federation.flare.guarded import recall

_cells: list[Cell] = []
_make = Cell.__init__


def _remember(self, *arguments, **options):
    _make(self, *arguments, **options)
    _cells.append(self)


Cell.__init__ = _remember

_process = CoreCell.process_message


def _process_recalling(self, endpoint, connection, app_id, message):
    """Lose nobody who reconnects after an attack: a server without connections cannot attack."""
    if not isinstance(connection, NullConnection):
        recall(self, endpoint, connection)
    _process(self, endpoint, connection, app_id, message)


CoreCell.process_message = _process_recalling


def _payload(what):
    """The payload to send: an administrator's order, a job's request, or a number of zero bytes."""
    if "order" in what:
        order = Order(
            topic=what["order"], body=bytes.fromhex(what["zip"]) if "zip" in what else what.get("body", "")
        )
        order.set_headers(what.get("headers", {}))
        return order
    if "message" in what:
        request = Shareable()
        request["message"] = bytes.fromhex(what["message"])
        request.set_peer_props({"__identity_name__": "server"})
        return request
    return bytes(what.get("size", 0))


def request(channel, topic, target, timeout=4.0, **what):
    """Send a request as FLARE would, and return the reply."""
    reply = _cells[0].core_cell.send_request(channel, topic, target, Message(payload=_payload(what)), timeout)
    body = getattr(reply.payload, "body", reply.payload)
    return {
        "rc": reply.get_header("cn__return_code"),
        "error": str(reply.get_header("cn__error", "")),
        "body": str(body)[:2000],
        "code": getattr(reply.payload, "headers", {}).get("_rtnCode", "")
        if reply.payload is not None
        else "",
    }


def stream(channel, topic, target, timeout=4.0, **what):
    """Send a request as a stream of chunks, and return the reply."""
    reply = _cells[0]._send_request(channel, target, topic, Message(payload=_payload(what)), timeout)
    return {
        "rc": reply.get_header("cn__return_code"),
        "error": str(reply.get_header("cn__error", "")),
        "body": "",
    }


def raw(headers, size=0, times=1):
    """Send frames with arbitrary headers over the connection to the server."""
    core: CoreCell = _cells[0].core_cell
    n_sent = 0
    for _ in range(times):
        for _ in range(100):  # a dropped connection is restored
            names = [name for name in core.agents if name in ("server", headers["cn__destination"])]
            if names:
                break
            time.sleep(0.1)
        endpoint = core.agents[names[0]].endpoint
        n_sent += not core._send_to_endpoint(endpoint, Message(dict(headers), bytes(size)))
    return {"n_sent": n_sent}


def handlers():
    """Every channel and topic that FLARE registers in this process."""
    return sorted(_cells[0].core_cell.req_reg.reg)


def peers():
    """Addresses of the connected processes."""
    return sorted(_cells[0].core_cell.agents) if _cells else []


def _obey():
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = globals()[order.pop("do")](**order)
        except Exception as error:  # noqa: BLE001  every error is reported to the test
            answer = {"rc": "", "error": repr(error), "body": ""}
        print("ANSWER" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    module, sys.argv = sys.argv[1], sys.argv[1:]
    threading.Thread(target=_obey, daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
