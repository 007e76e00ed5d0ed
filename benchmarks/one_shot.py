"""A one-shot federation, end to end without evaluation, compared with its bare forward passes.

The yardstick is the minimum that any one-shot run needs: two forward passes through the blocks per
calibration window (observe and advance), with all weights in memory, without hooks and without the head. It
is measured in the same process, alternating with the runs. Goals: at most 1.3 times the yardstick with 2
windows of 2048 tokens per participant, and at most 2 times with 2 windows of 512.

    python -m benchmarks.one_shot [--participants 4] [--length 512] [--dtype float32] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks._harness import machine
from fedprllm import PruneConfig, prune
from fedprllm.demo.compare import demo_model
from fedprllm.models.blockwise import DTYPES
from fedprllm.models.source import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF file [SmolLM2-135M]")
    parser.add_argument("--participants", type=int, default=4)
    parser.add_argument("--windows", type=int, default=2, help="windows per participant")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    folder = resolve_model(options.model or demo_model())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[options.dtype]).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (options.windows, options.length)
    participants = [
        torch.randint(model.config.vocab_size, shape, generator=generator)
        for _ in range(options.participants)
    ]
    config = PruneConfig(dtype=options.dtype)
    forward_s, federation_s, phases = [], [], []
    for _ in range(options.repeats):
        forward_s.append(_forward_passes(model, participants))
        out = Path(tempfile.mkdtemp(prefix="one-shot-"))
        start = time.perf_counter()
        result = prune(folder, participants, config, out=out / "run")
        federation_s.append(time.perf_counter() - start)
        totals: dict[str, float] = {}
        for record in result.record.blocks:
            for phase, seconds in record.seconds.items():
                totals[phase] = totals.get(phase, 0.0) + seconds
        phases.append({phase: round(seconds, 2) for phase, seconds in totals.items()})
        shutil.rmtree(out)
        print(
            f"forward {forward_s[-1]:.1f} s, federation {federation_s[-1]:.1f} s, {phases[-1]}",
            file=sys.stderr,
        )
    ratios = [ours / bare for ours, bare in zip(federation_s, forward_s, strict=True)]
    print(
        json.dumps(
            {
                "benchmark": "one_shot",
                "participants": options.participants,
                "windows": options.windows,
                "window_length": options.length,
                "dtype": options.dtype,
                "forward_s": statistics.median(forward_s),
                "federation_s": statistics.median(federation_s),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "phases_s": phases[-1],
                "machine": machine(),
            }
        )
    )


@torch.no_grad()
def _forward_passes(model: torch.nn.Module, participants: list[torch.Tensor]) -> float:
    """Measure two passes over every window in seconds, one window at a time as in the walk."""
    base = model.base_model
    base(input_ids=participants[0][:1], use_cache=False)
    start = time.perf_counter()
    for windows in participants:
        for window in windows:
            for _ in range(2):
                base(input_ids=window[None], use_cache=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
