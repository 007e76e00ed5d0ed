"""Run a whole federation on this machine, and compare its model with that of the same run in one process.

python examples/federation_in_one_script.py MODEL north.txt south.txt west.txt --out federation

Server, participants and coordinator are processes with keys of their own, and talk over TLS on the loopback
interface, as they do on several machines.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from fedprllm import PruneConfig, PruneResult, prune


def federate(args: argparse.Namespace, out: Path) -> PruneResult:
    """Rehearse a federation, with one participant for each text."""
    command = [sys.executable, "-m", "fedprllm", "federation", "rehearse", "--out", str(out)]
    command += ["--model", args.model, "--participants", str(len(args.texts))]
    command += ["--windows", str(args.windows), "--window-length", str(args.window_length)]
    for text in args.texts:
        command += ["--data", text]
    subprocess.run(command, check=True)
    return PruneResult.load(out / "run")


def differing(one: Path, other: Path) -> int:
    """Number of parameters that differ between two models."""
    first, second = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (one, other))
    return sum(int(torch.ne(first[name], second[name]).sum()) for name in first)


def main() -> None:
    """Read the arguments, prune in both ways, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("texts", nargs="+", help="one text file for each participant")
    parser.add_argument("--out", type=Path, default=Path("federation"), help="folder of both runs")
    parser.add_argument("--windows", type=int, default=4, help="calibration windows for each participant")
    parser.add_argument("--window-length", type=int, default=128, help="tokens in a window")
    args = parser.parse_args()

    together = federate(args, args.out / "rehearsal")
    config = PruneConfig(sparsity=0.5, windows=args.windows, window_length=args.window_length)
    alone = prune(args.model, args.texts, config, out=args.out / "one-process")
    print(f"{differing(together.model_dir, alone.model_dir)} parameters differ")


if __name__ == "__main__":
    main()
