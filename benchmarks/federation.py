"""The cost of the network: a federated run compared with the same run in one process.

    python -m benchmarks.federation                    SmolLM2-135M, masks
    python -m benchmarks.federation --large-updates    two wide random blocks, weights and masks, 238 MB each

Server, sites and computations are real processes on loopback. All traffic between sites and server, including
TLS and the engine's own messages, passes through a relay that counts it. Memory is that of the largest
process of each part. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks._harness import SEED, machine, print_table
from benchmarks._relay import Relay
from fedprllm import PruneConfig, prune
from fedprllm.api import PruneResult
from fedprllm.federation.flare.kits import FEDERATION_FILE
from fedprllm.federation.flare.processes import running, start_participant, start_server
from fedprllm.federation.flare.rehearsal import free_port, rehearsal_kits
from fedprllm.federation.flare.supervisor import supervise
from fedprllm.federation.plan import RunPlan, SiteSettings
from fedprllm.files import read_json, write_json

# Parts of a federation, by a word in the command line of their processes.
PARTS = {
    "federation.site.worker": "computation",
    "client.worker_process": "site_job",
    "server.runner_process": "coordinator_job",
    "client.client_train": "site",
    "server.server_train": "server",
}


class Watch:
    """Peak memory in MB of this process's descendants, by part, sampled ten times a second.

    Attributes:
        resident: The kernel's own high-water mark, including mapped files. (The system can reclaim the memory
            of a mapped checkpoint.)
        anonymous: Largest sample without mapped files.
    """

    def __init__(self) -> None:
        self.resident: dict[str, float] = {}
        self.anonymous: dict[str, float] = {}
        self._seconds: dict[int, tuple[str, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def cpu_s(self) -> dict[str, float]:
        """Processor seconds by part so far, of all its processes, up to a sample each."""
        found: dict[str, float] = {}
        for part, seconds in self._seconds.values():
            found[part] = found.get(part, 0.0) + seconds
        return {part: round(seconds, 2) for part, seconds in found.items()}

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error, OSError, StopIteration, KeyError):
                    command = " ".join(process.cmdline())
                    part = next(part for word, part in PARTS.items() if word in command)
                    times = process.cpu_times()
                    self._seconds[process.pid] = part, times.user + times.system
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    status = dict(line.split(":", 1) for line in lines)
                    for peaks, field in ((self.resident, "VmHWM"), (self.anonymous, "RssAnon")):
                        megabytes = round(int(status[field].split()[0]) * 1024 / 1e6)
                        peaks[part] = max(peaks.get(part, 0), megabytes)


def large_model(folder: Path) -> Path:
    """A random Llama of two wide blocks of 231 MB; a token is a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=2048,
        intermediate_size=6656,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def texts(folder: Path, n_participants: int) -> dict[str, str]:
    """One text per participant: the demonstration's texts, then generated sentences for further ones."""
    from fedprllm.demo.texts import demo_texts

    paths = [path.resolve() for path, _ in demo_texts(folder).values()]
    for number in range(len(paths), n_participants):
        paths.append(folder / f"{number}.txt")
        paths[-1].write_text(f"Participant {number} saw a bird and ran home to tell the others. " * 2000)
    return {f"site-{number:02d}": str(path) for number, path in enumerate(paths[:n_participants], 1)}


def in_process(
    model: str, data: dict[str, str], options: dict[str, Any], out: Path
) -> tuple[PruneResult, float]:
    """Run in this process. Returns the result and the time in seconds."""
    begin = time.perf_counter()
    result = prune(model, {n: [d] for n, d in data.items()}, PruneConfig(**options), out=out)
    return result, time.perf_counter() - begin


def federated(
    model: str, data: dict[str, str], options: dict[str, Any], folder: Path
) -> tuple[Path, dict[str, Any]]:
    """Run over a fresh federation. Returns the run's folder and the measurements."""
    settings = {
        name: SiteSettings(
            data=[path],
            model=model,
            threads=1,
            allow=["mask", "weights"],
            seed=0,
            min_windows=1,
            min_tokens=2,
            min_participants=1,
            confirm=False,
            require_secure=bool(options.get("secure")),
        )
        for name, path in data.items()
    }
    kits, port = folder / "kits", free_port()
    federation = rehearsal_kits(kits, settings)
    _let_the_server_listen_on(kits, port)
    relay = Relay(federation.port, port)
    first: list[float] = []

    def tell(what: str, details: dict[str, Any]) -> None:
        if what == "progress" and not first and any(p["n_ready"] for p in details["participants"].values()):
            first.append(time.perf_counter())

    plan = RunPlan(name="benchmark", model=model, prune=options, quorum=len(data))
    with ExitStack() as stack:
        stack.callback(relay.close)
        watch = stack.enter_context(Watch())
        stack.enter_context(running(partial(start_server, kits / "server")))
        for name in data:
            stack.enter_context(running(partial(start_participant, kits / name)))
        begin = time.perf_counter()
        run = supervise(plan, federation, kits / "admin", kits / "server" / "runs", tell)
        end = time.perf_counter()
    result = read_json(run / "result.json")
    n_blocks = len(result["blocks"])
    return run, {
        "update_bytes": sum(one["update_bytes"] for one in result["participants"].values()),
        "wire_up_bytes": relay.up,
        "wire_down_bytes": relay.down,
        "until_first_update_s": round(first[0] - begin, 1),
        # The time in which all blocks but the first were computed, sent, checked and decided.
        "federated_s_per_block": round((end - first[0]) / max(1, n_blocks - 1), 3),
        "run_s": round(end - begin, 1),
        "cpu_s": watch.cpu_s,
        "peak_resident_mb": watch.resident,
        "peak_anonymous_mb": watch.anonymous,
    }


def _let_the_server_listen_on(kits: Path, port: int) -> None:
    """Move the server to another port, so that the relay gets the kits' port. The coordinator skips it."""
    path = kits / "server" / "startup" / "fed_server.json"
    config = read_json(path)
    config["servers"][0]["service"]["target"] = f"localhost:{port}"
    config["servers"][0]["admin_port"] = port
    write_json(path, config)
    path = kits / "server" / "local" / FEDERATION_FILE
    write_json(path, read_json(path) | {"port": port})
    path = kits / "admin" / "startup" / "fed_admin.json"
    config = read_json(path)
    config["admin"]["port"] = port
    write_json(path, config)


def measure(folder: Path, model: str, options: dict[str, Any], n_participants: int) -> dict[str, Any]:
    """Measure one row: in one process with all threads, with one thread, and federated with one each."""
    data = texts(folder / "texts", n_participants)
    torch.set_num_threads(os.cpu_count() or 1)
    _, seconds = in_process(model, data, options, folder / "warm")
    torch.set_num_threads(1)  # as on the sites: the order of a sum depends on it, and so does its last bit
    alone, one_thread_s = in_process(model, data, options, folder / "alone")
    run, measured = federated(model, data, options, folder)
    shards = sorted(alone.model_dir.glob("*.safetensors"))
    same = all((run / "model" / shard.name).read_bytes() == shard.read_bytes() for shard in shards)
    payload = n_participants * sum(alone.record.update_bytes_per_block)
    n_blocks = len(alone.record.blocks)
    return {
        "participants": n_participants,
        "same_bits": bool(shards) and same,
        "payload_bytes": payload,
        "update_overhead_percent": round(100 * (measured["update_bytes"] / payload - 1), 4),
        "wire_overhead_percent": round(100 * (measured["wire_up_bytes"] / payload - 1), 2),
        "in_process_s_per_block": round(seconds / n_blocks, 3),
        "in_process_one_thread_s_per_block": round(one_thread_s / n_blocks, 3),
        **measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--participants", type=int, nargs="+", help="[4; with --large-updates 2 4]")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window-length", type=int, help="tokens [256; with --large-updates 64]")
    parser.add_argument("--strategy", default="one-shot")
    parser.add_argument("--large-updates", action="store_true")
    chosen = parser.parse_args()
    large = chosen.large_updates
    about = machine()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options = {
            "share": "weights" if large else "mask",
            "strategy": chosen.strategy,
            "windows": chosen.windows,
            "window_length": chosen.window_length or (64 if large else 256),
        }
        model = str(large_model(folder / "wide") if large else _smollm2())
        for n_participants in chosen.participants or ([2, 4] if large else [4]):
            rows.append(measure(folder / str(n_participants), model, options, n_participants))
            print(json.dumps(rows[-1]), file=sys.stderr)
        _show(rows)
    figures = {name: {row["participants"]: row[name] for row in rows} for name in rows[0]}
    figures = {name: next(iter(by.values())) if len(rows) == 1 else by for name, by in figures.items()}
    settings = {"benchmark": "federation", "model": Path(model).name, "seed": SEED, **options}
    print(json.dumps({**settings, **figures, "machine": about}), flush=True)
    os._exit(0)  # FLARE's session threads would keep this process alive


def _smollm2() -> Path:
    from fedprllm.demo.compare import demo_model

    return demo_model()


def _show(rows: Sequence[dict[str, Any]]) -> None:
    names = [name for name in rows[0] if name != "participants"]
    table = [
        {"figure": name, **{f"{row['participants']} participants": str(row[name]) for row in rows}}
        for name in names
    ]
    print_table("a federated run against the same run in one process", table)


if __name__ == "__main__":
    main()
