"""Peak memory of a one-shot run as a function of the number of participants.

Each run is a separate process that prunes SmolLM2-135M. Only the participants' hidden states should grow with
their number: window length times hidden size times 4 bytes for each.

    python -m benchmarks.memory [--participants 1 4 16] [--length 512]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from benchmarks._harness import machine

_CHILD = """
import resource, sys, tempfile, torch
from fedprllm import prune
from fedprllm.demo.compare import demo_model
from fedprllm.models.source import resolve_model
n, length = int(sys.argv[1]), int(sys.argv[2])
windows = [torch.randint(49152, (1, length), generator=torch.Generator().manual_seed(i)) for i in range(n)]
with tempfile.TemporaryDirectory() as out:
    prune(resolve_model(demo_model()), windows, out=out + "/run")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--participants", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    peaks = {}
    for n in options.participants:
        command = [sys.executable, "-c", _CHILD, str(n), str(options.length)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[n] = int(done.stdout.splitlines()[-1]) / 1e3
        print(f"{n} participants: {peaks[n]:.0f} MB", file=sys.stderr)
    print(
        json.dumps(
            {
                "benchmark": "memory",
                "window_length": options.length,
                "peak_mb_by_participants": peaks,
                "block_mb": 3_540_096 * 4 / 1e6,
                "model_mb": 134_515_008 * 4 / 1e6,
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
