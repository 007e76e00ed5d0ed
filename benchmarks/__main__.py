"""Run the benchmarks one after another and write docs/benchmarks.md: ``make bench``.

python -m benchmarks                run all benchmarks that need nothing but this project
python -m benchmarks NAME ...       run only these; the others keep their last results
python -m benchmarks --page         run none; only write the page from the last results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from benchmarks._harness import machine
from benchmarks._page import BENCHMARKS, RESULTS, ROOT, write_page
from fedprllm.files import write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"unknown benchmark {', '.join(unknown)}: expected {', '.join(BENCHMARKS)}")
    installed = [name for name, benchmark in BENCHMARKS.items() if not benchmark.by_hand]
    names = [] if options.page else options.names or installed
    failed = []
    for name in names:
        result = _measured(name)
        write_json(RESULTS / f"{name}.json", result)
        write_page()  # after each benchmark, so that a stopped run keeps what it has measured
        if "failed" in result:
            failed.append(name)
    write_page()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _measured(name: str) -> dict[str, Any]:
    """Run a benchmark. Returns the JSON it ends with, or the reason under ``failed`` if there is none."""
    benchmark = BENCHMARKS[name]
    print(f"{name}: {benchmark.title}", file=sys.stderr)
    start = time.perf_counter()
    command = [sys.executable, "-m", *benchmark.command]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}", "machine": machine()}
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": "the last line of its output is not JSON", "machine": machine()}
    return result | {"took_s": round(time.perf_counter() - start)}


if __name__ == "__main__":
    sys.exit(main())
