"""Makes the coordinator's job process of a federation disobey, and records what all processes send.

Python imports this file when its folder is in PYTHONPATH.
"""

import os
import runpy
import sys
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[2] / "recorder" / "sitecustomize.py"))

if "FEDPRLLM_ORDERS" in os.environ and any("server.runner_process" in word for word in sys.orig_argv):
    from tests.secure import hostile_coordinator

    hostile_coordinator.take_over(Path(os.environ["FEDPRLLM_ORDERS"]))
