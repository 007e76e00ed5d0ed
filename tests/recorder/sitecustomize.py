"""Records every message that a process of the engine hands to a connection, before TLS.

Python imports this file when its folder is in PYTHONPATH; the computation is not of the engine and has no
connection. Each message is a file: a line of JSON, then the payload.
"""

import itertools
import json
import os
import sys
from pathlib import Path

if any("nvflare" in word for word in sys.orig_argv) and "FEDPRLLM_TRAFFIC" in os.environ:
    from nvflare.fuel.f3.sfm import sfm_conn

    send, numbers = sfm_conn.SfmConnection.send_frame, itertools.count()

    def recorded(self, prefix, headers, payload):  # type: ignore[no-untyped-def]
        content = b"" if payload is None else bytes(payload)
        about = {
            "process": " ".join(sys.orig_argv),
            "to": getattr(self.sfm_endpoint and self.sfm_endpoint.endpoint, "name", ""),
            "type": prefix.type,
            "headers": {str(name): str(value) for name, value in (headers or {}).items()},
        }
        name = f"{os.getpid()}-{next(numbers):06d}.frame"
        Path(os.environ["FEDPRLLM_TRAFFIC"], name).write_bytes(json.dumps(about).encode() + b"\n" + content)
        return send(self, prefix, headers, payload)

    sfm_conn.SfmConnection.send_frame = recorded
