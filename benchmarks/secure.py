"""What secure aggregation costs: its own steps, and a whole run under masks beside the same in the clear.

    python -m benchmarks.secure [--participants 4 8 16 64] [--repeats 2] [--no-runs] [--quick]

Steps: all parties of a session in this process, one after the other, with one thread; an update is the masks
of a block. LLaMA-7B is extrapolated from SmolLM2-135M: streams and words by the number of weights, keys and
shares by the number of blocks; the server's memory is measured with a block of its size. Runs: real processes
on loopback, SmolLM2-135M, 4 participants with 2 windows of 256 tokens, in the clear and under masks in turn.
Seconds are processor seconds (user and system, all processes) unless they say wall. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks._harness import machine
from fedprllm.core.bitplanes import PackedVotes
from fedprllm.secure.journal import MemoryJournal
from fedprllm.secure.participant import SecureParticipant
from fedprllm.secure.server import SecureServer
from fedprllm.secure.terms import Limits, Roster, Terms
from fedprllm.secure.words import n_words, pack_counts, unpack_counts

__all__ = ["overhead", "server_memory", "tables"]

_T = TypeVar("_T")
# A third of the participants may conspire with the server; one of three or four.
COLLUDING = {3: 1, 4: 1, 8: 2, 16: 5, 64: 21}
_PARTICIPANTS, _WINDOWS, _LENGTH = 4, 2, 256


class Shape(NamedTuple):
    """A model's size: weights of each Linear of a block, and number of blocks."""

    linears: tuple[int, ...]
    blocks: int

    @property
    def weights(self) -> int:
        """Weights of a block."""
        return sum(self.linears)


SMOLLM2 = Shape((331_776, 110_592, 110_592, 331_776, 884_736, 884_736, 884_736), 30)
LLAMA_7B = Shape((*4 * (16_777_216,), *3 * (45_088_768,)), 32)
_QUICK = Shape((20_000, 30_000), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--participants", type=int, nargs="+", default=[4, 8, 16, 64], choices=COLLUDING)
    parser.add_argument("--repeats", type=int, default=2, help="runs in the clear and under masks")
    parser.add_argument("--no-runs", action="store_true", help="measure the steps only")
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it works")
    options = parser.parse_args()
    about = machine()
    shape = _QUICK if options.quick else SMOLLM2
    rows = [measured(m, shape.weights, min(3, shape.blocks)) for m in options.participants]
    memory = peak_memory((_QUICK if options.quick else LLAMA_7B).linears)
    runs = [] if options.no_runs or options.quick else list(_runs(options.repeats))
    result = {"benchmark": "secure", "quick": options.quick, "steps": rows, "server_memory": memory}
    result |= {"weights": shape.weights, "blocks": shape.blocks, "runs": runs, "machine": about}
    for heading, lines in tables(result).items():
        print(heading, *lines, sep="\n", file=sys.stderr)
    print(json.dumps(result), flush=True)
    os._exit(0)  # FLARE's session threads would keep this process alive


# ---- the page ----------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The tables of the page, by heading."""
    weights, blocks = result["weights"], result["blocks"]
    found = {
        "A block of SmolLM2-135M, masks (kB and processor seconds)": list(map(_step_row, result["steps"])),
        "All blocks of SmolLM2-135M, and of LLaMA-7B by extrapolation": [
            _whole_row(row, model, n_blocks, n_weights / weights, weights)
            for model, n_blocks, n_weights in (
                ("SmolLM2-135M", blocks, weights),
                ("LLaMA-7B", LLAMA_7B.blocks, LLAMA_7B.weights),
            )
            for row in result["steps"]
        ],
        "Memory that the server needs to add up and unmask a block of LLaMA-7B": [result["server_memory"]],
    }
    if result["runs"]:
        found["Whole runs of 4 participants, all processes"] = list(map(_run_row, result["runs"]))
    return found


def _step_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "participants": row["participants"],
        "t": row["threshold"],
        "bits a weight": row["bits"],
        "update, kB": row["update_bytes"] / 1e3,
        "keys and shares up, kB": row["keys_up_bytes"] / 1e3,
        "down, kB": row["keys_down_bytes"] / 1e3,
        "keys and shares, s": row["keys_s"],
        "pack, s": row["pack_s"],
        "mask, s": row["mask_s"],
        "server unmasks, s": row["unmask_s"],
        "server unpacks, s": row["unpack_s"],
    }


def _whole_row(
    row: Mapping[str, Any], model: str, n_blocks: int, times: float, weights: int
) -> dict[str, Any]:
    """Figures of a whole run with blocks of ``times`` as many weights, from those of a block."""
    return {
        "model": model,
        "participants": row["participants"],
        "updates in the clear, MB": n_blocks * times * weights / 8e6,
        "under masks, MB": n_blocks * times * row["update_bytes"] / 1e6,
        "keys and shares up, MB": n_blocks * row["keys_up_bytes"] / 1e6,
        "down, MB": n_blocks * row["keys_down_bytes"] / 1e6,
        "each participant, s": n_blocks * (row["keys_s"] + times * (row["pack_s"] + row["mask_s"])),
        "server, s": n_blocks * times * (row["unmask_s"] + row["unpack_s"]),
    }


def _run_row(run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "updates": "under masks" if run["secure"] else "in the clear",
        "processor seconds": sum(run["cpu_s"].values()),
        "of these the coordinator's job": run["cpu_s"]["coordinator_job"],
        "the computations": run["cpu_s"]["computation"],
        "wall seconds": run["run_s"],
        "up, MB": run["wire_up_bytes"] / 1e6,
        "down, MB": run["wire_down_bytes"] / 1e6,
        "coordinator's job, peak MB without mapped files": run["peak_anonymous_mb"]["coordinator_job"],
    }


def overhead(result: Mapping[str, Any]) -> float:
    """Processor seconds of runs under masks relative to runs in the clear, medians."""

    def seconds(secure: bool) -> float:
        return median(sum(run["cpu_s"].values()) for run in result["runs"] if run["secure"] == secure)

    return seconds(True) / seconds(False)


def server_memory(result: Mapping[str, Any]) -> float:
    """Peak memory of adding up and unmasking, relative to one block (float32) and one masked update."""
    memory = result["server_memory"]
    return float(memory["peak_mb"] / (memory["block_mb"] + memory["masked_update_mb"]))


# ---- steps -------------------------------------------------------------------------------------------


def timed(make: Callable[[], _T]) -> tuple[_T, float]:
    """What a function returns, and the processor seconds that it took."""
    start = time.process_time()
    found = make()
    return found, time.process_time() - start


def measured(m: int, n_weights: int, n_blocks: int) -> dict[str, Any]:
    """One session: every participant takes every step, and the sum is compared with the plain one."""
    people, server, terms = session(m, n_blocks)
    names = list(people)
    keys_s, up, down = _exchange(people, server, terms)
    masks = np.random.default_rng(0).random(n_weights) < 0.5
    bits = m.bit_length()
    seconds = dict.fromkeys(("pack_s", "mask_s", "unmask_s", "unpack_s"), 0.0)
    for sum_ in terms.sums:
        words, took = timed(lambda: pack_counts(masks, bits))
        seconds["pack_s"] += took
        total = np.zeros_like(words)
        for name in names:
            hidden, took = timed(lambda name=name, words=words, sum_=sum_: people[name].mask(sum_, words))
            seconds["mask_s"] += took / m
            total += hidden
            people[name].settle(sum_)
        signatures = {name: one.agree({sum_: names}) for name, one in people.items()}
        answers = {
            name: people[name].unmask({sum_: names}, signatures)[sum_] for name in names[: server.limit]
        }
        _, took = timed(
            lambda total=total, answers=answers, sum_=sum_: server.unmask(sum_, total, names, answers)
        )
        seconds["unmask_s"] += took
        counts, took = timed(lambda total=total: unpack_counts(total, bits, n_weights))
        votes, more = timed(lambda counts=counts: PackedVotes.of_counts(counts, m))
        seconds["unpack_s"] += took + more
        assert np.array_equal(votes.counts().numpy(), m * masks), "wrong sum"
    return {
        "participants": m,
        "threshold": server.limit,
        "bits": round(64 * len(words) / n_weights, 3),
        "update_bytes": 8 * len(words),
        "keys_s": keys_s / m / n_blocks,
        "keys_up_bytes": up / m / n_blocks,
        "keys_down_bytes": down / m / n_blocks,
        **{name: value / n_blocks for name, value in seconds.items()},
    }


def session(m: int, n_blocks: int) -> tuple[dict[str, SecureParticipant], SecureServer, Terms]:
    """The parties of a session of m participants with a sum for each block."""
    names = [f"p{index:02d}" for index in range(m)]
    limits = Limits(max_colluding=COLLUDING[m])
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    roster = Roster({name: one.public_key().public_bytes_raw() for name, one in identities.items()})
    people = {
        name: SecureParticipant(name, one, roster, limits, MemoryJournal())
        for name, one in identities.items()
    }
    terms = Terms({f"block {block:04d}": names for block in range(n_blocks)})
    return people, SecureServer(terms, terms.check(limits)), terms


def _exchange(
    people: dict[str, SecureParticipant], server: SecureServer, terms: Terms
) -> tuple[float, int, int]:
    """Steps 1 to 3; returns processor seconds, and bytes from and to all participants."""
    start = time.process_time()
    up = down = 0
    for name, one in people.items():
        advert = one.advertise(server.session, terms)
        server.take_advert(name, advert)
        up += len(advert)
    down += len(people) * up
    for name, one in people.items():
        boxes = one.share(server.adverts)
        server.take_boxes(name, boxes)
        up += sum(map(len, boxes.values()))
    for name, one in people.items():
        boxes = server.boxes_for(name)
        one.receive(boxes)
        down += sum(map(len, boxes.values()))
    return time.process_time() - start, up, down


def peak_memory(linears: tuple[int, ...]) -> dict[str, Any]:
    """Memory that the server allocates for a block: updates arrive one after the other, then unmasking."""
    people, server, terms = session(_PARTICIPANTS, 1)
    _exchange(people, server, terms)
    (sum_,), names, bits = terms.sums, list(people), _PARTICIPANTS.bit_length()
    rng = np.random.default_rng(0)
    words = np.concatenate([pack_counts(rng.integers(0, 2, n, np.uint8), bits) for n in linears])
    signatures = {name: one.agree({sum_: names}) for name, one in people.items()}
    answers = {name: one.unmask({sum_: names}, signatures)[sum_] for name, one in people.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, one in people.items():
            one.mask(sum_, words).tofile(Path(folder, name))
            one.settle(sum_)
        size = words.nbytes
        del words
        tracemalloc.start()
        total, votes, start = np.zeros(size // 8, "<u8"), [], 0
        for name in names:
            total += np.fromfile(Path(folder, name), "<u8")
        server.unmask(sum_, total, names, answers)
        for n in linears:
            part = total[start : start + n_words(n, bits)]
            votes.append(PackedVotes.of_counts(unpack_counts(part, bits, n), _PARTICIPANTS))
            start += len(part)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return {
        "participants": _PARTICIPANTS,
        "block_mb": round(4 * sum(linears) / 1e6, 1),
        "masked_update_mb": round(size / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
    }


# ---- runs --------------------------------------------------------------------------------------------


def _runs(repeats: int) -> Any:
    """Whole runs on real processes, in the clear and under masks alternately."""
    from benchmarks.federation import _smollm2, federated, texts

    options = {"share": "mask", "windows": _WINDOWS, "window_length": _LENGTH}
    model = str(_smollm2())
    with tempfile.TemporaryDirectory() as temporary:
        data = texts(Path(temporary) / "texts", _PARTICIPANTS)
        found: dict[bool, bytes] = {}
        for number in range(2 * repeats):
            secure = bool(number % 2)
            folder = Path(temporary) / str(number)
            run, figures = federated(model, data, {**options, "secure": secure}, folder)
            bits = b"".join(path.read_bytes() for path in sorted((run / "model").glob("*.safetensors")))
            assert found.setdefault(not secure, bits) == bits, "a run under masks gave another model"
            print(json.dumps({"secure": secure, **figures}), file=sys.stderr, flush=True)
            yield {"secure": secure, **figures}


if __name__ == "__main__":
    main()
