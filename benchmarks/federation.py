"""What the network costs: a federated run against the same run in one process.

    python benchmarks/federation.py                    SmolLM2-135M, 4 participants, masks
    python benchmarks/federation.py --large-updates    one wide random block, Gram matrices, over 200 MB each

Server, sites and computations are real processes on the loopback. Traffic is what the loopback carried, so
every message counts once for each process it passes (computation's site, site's parent, server, job).
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from fedprllm import PruneConfig, prune
from fedprllm.federation.flare.processes import running, start_participant, start_server
from fedprllm.federation.flare.rehearsal import rehearsal_kits
from fedprllm.federation.flare.supervisor import supervise
from fedprllm.federation.plan import RunPlan, SiteSettings
from fedprllm.files import read_json


class Watch:
    """Peak memory by role, sampled five times a second, and the bytes of the loopback."""

    def __init__(self, roots: dict[str, int]) -> None:
        self.peaks: dict[str, float] = {}
        self._roots, self._stop = roots, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._before, self._begin = loopback_bytes(), time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._begin
        self.loopback = loopback_bytes() - self._before

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            for root, pid in self._roots.items():
                try:
                    parent = psutil.Process(pid)
                    family = [(parent, f"{root} parent"), *self._children(parent, root)]
                    for process, role in family:
                        megabytes = process.memory_info().rss / 1e6
                        self.peaks[role] = max(self.peaks.get(role, 0.0), round(megabytes))
                except psutil.NoSuchProcess:
                    continue

    def _children(self, parent: psutil.Process, root: str) -> list[tuple[psutil.Process, str]]:
        children = []
        for child in parent.children(recursive=True):
            is_worker = any("federation.worker" in word for word in child.cmdline())
            children.append((child, f"{root} {'computation' if is_worker else 'job'}"))
        return children


def loopback_bytes() -> int:
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


def large_model(folder: Path) -> Path:
    """A random Llama of two wide blocks, whose Gram matrices are 228 MB a block."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shared = Path(__file__).resolve().parents[2] / "shared" / "data" / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(shared)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=6656,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--participants", type=int, default=4)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window-length", type=int, default=256)
    parser.add_argument("--strategy", default="one-shot")
    parser.add_argument("--large-updates", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(Path(temporary), arguments)), flush=True)
    os._exit(0)  # FLARE's session threads would keep Python alive


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    if arguments.large_updates:
        model, share = str(large_model(folder / "wide")), "gram"
        texts = [folder / f"{number}.txt" for number in range(arguments.participants)]
        for number, path in enumerate(texts):
            path.write_text(f"Participant {number} saw a bird and ran home to tell the others. " * 400)
    else:
        from fedprllm.demo import demo_model
        from fedprllm.demo_texts import demo_texts

        model, share = str(demo_model()), "mask"
        texts = [path.resolve() for path, _ in demo_texts(folder / "texts").values()]
    options = {
        "share": share,
        "strategy": arguments.strategy,
        "windows": arguments.windows,
        "window_length": arguments.window_length,
    }
    names = [f"site-{number}" for number in range(1, arguments.participants + 1)]
    data = {name: str(path) for name, path in zip(names, texts, strict=False)}
    torch.set_num_threads(1)
    begin = time.perf_counter()
    alone = prune(model, {n: [d] for n, d in data.items()}, PruneConfig(**options), out=folder / "alone")
    in_process_s = time.perf_counter() - begin

    people = {
        name: SiteSettings(data=[path], model=model, threads=1, allow=["mask", "gram"])
        for name, path in data.items()
    }
    kits = folder / "kits"
    federation = rehearsal_kits(kits, people)
    plan = RunPlan(name="benchmark", model=model, prune=options, quorum=len(names))
    with running(start_server(kits / "server")) as server:
        sites = [start_participant(kits / name) for name in names]
        try:
            roots = {"server": server.pid, "site": sites[0].pid}
            with Watch(roots) as watch:
                run = supervise(plan, federation, kits / "admin", kits / "server" / "runs")
        finally:
            for site in sites:
                with running(site):
                    pass
    result = read_json(run / "result.json")
    same = all(
        (run / "model" / path.name).read_bytes() == path.read_bytes()
        for path in alone.model_dir.glob("*.safetensors")
    )
    sent = sum(person["update_bytes"] for person in result["participants"].values())
    n_blocks = len(result["blocks"])
    payload = len(names) * sum(alone.details["update_bytes_per_block"])
    return {
        "model": Path(model).name,
        "share": share,
        "strategy": arguments.strategy,
        "participants": len(names),
        "same_bits": same,
        "payload_bytes": payload,
        "update_bytes": sent,
        "update_overhead": round(sent / payload - 1, 6),
        "loopback_bytes": watch.loopback,
        "in_process_s_per_block": round(in_process_s / n_blocks, 3),
        "federated_s_per_block": round(watch.seconds / n_blocks, 3),
        "peak_mb": watch.peaks,
    }


if __name__ == "__main__":
    main()
