"""Imported by every Python of a test that has this folder in PYTHONPATH: on SIGUSR2, lists what is open.

It looks at FLARE's own tables of a running process and changes nothing in it.
"""

import json
import os
import signal
import sys
from pathlib import Path


def _list(*_: object) -> None:
    core = sys.modules["nvflare.fuel.f3.cellnet.core_cell"].CoreCell
    admin = sys.modules.get("nvflare.private.fed.client.admin")
    for address, cell in core.ALL_CELLS.items():
        streams = getattr(getattr(cell.fedprllm_guard, "stream_cell", None), "byte_receiver", None)
        found = {
            "requests": sorted(cell.req_reg.reg),
            "streams": sorted(streams.registry.reg) if streams else [],
            "orders": sorted(_orders(admin)) if admin else [],
        }
        path = Path(os.environ["FEDPRLLM_LISTING"]) / f"{address}.json"
        path.with_suffix(".part").write_text(json.dumps(found))
        path.with_suffix(".part").rename(path)


def _orders(admin: object) -> set[str]:
    import gc

    agents = [one for one in gc.get_objects() if type(one) is admin.FedAdminAgent]
    return {topic for agent in agents for topic in agent.processors}


if "FEDPRLLM_LISTING" in os.environ:
    signal.signal(signal.SIGUSR2, _list)
