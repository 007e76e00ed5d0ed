"""Secure aggregation's own cost: time and bytes of its steps, for several numbers of participants.

    python -m benchmarks.secure [--participants 4 8 16 64] [--weights 3538944] [--blocks 2]

All parties of a session run in this process, one after the other, with one thread. An update is the masks of
one block, by default of SmolLM2-135M. Times are processor seconds. "once" is the exchange of keys and shares
for all blocks; the rest is for each block. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedprllm.secure.journal import MemoryJournal
from fedprllm.secure.participant import SecureParticipant
from fedprllm.secure.server import SecureServer
from fedprllm.secure.terms import Limits, Roster, Terms
from fedprllm.secure.words import pack_counts, unpack_counts

_T = TypeVar("_T")
# A third of the participants may conspire with the server; one of three or four.
COLLUDING = {3: 1, 4: 1, 8: 2, 16: 5, 64: 21}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--participants", type=int, nargs="+", default=[4, 8, 16, 64], choices=COLLUDING)
    parser.add_argument("--weights", type=int, default=3_538_944, help="weights of a block")
    parser.add_argument("--blocks", type=int, default=2)
    options = parser.parse_args()
    rows = [measured(m, options.weights, options.blocks) for m in options.participants]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(json.dumps({"benchmark": "secure", "weights": options.weights, "rows": rows}))


def timed(make: Callable[[], _T]) -> tuple[_T, float]:
    """What a function returns, and the processor seconds that it took."""
    start = time.process_time()
    found = make()
    return found, time.process_time() - start


def measured(m: int, n_weights: int, n_blocks: int) -> dict[str, Any]:
    """One session: every participant takes every step, and the sum is compared with the plain one."""
    names = [f"p{index:02d}" for index in range(m)]
    limits = Limits(max_colluding=COLLUDING[m])
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    roster = Roster({name: one.public_key().public_bytes_raw() for name, one in identities.items()})
    people = {
        name: SecureParticipant(name, one, roster, limits, MemoryJournal())
        for name, one in identities.items()
    }
    terms = Terms({f"block {block}": names for block in range(n_blocks)})
    server = SecureServer(terms, terms.check(limits))
    once, up, down = _exchange(people, server, terms)
    masks = np.random.default_rng(0).random(n_weights) < 0.5
    bits = m.bit_length()
    pack_s = mask_s = unmask_s = 0.0
    for sum_ in terms.sums:
        words, seconds = timed(lambda: pack_counts(masks, bits))
        pack_s += seconds
        total = np.zeros_like(words)
        for name in names:
            hidden, seconds = timed(lambda name=name, words=words, sum_=sum_: people[name].mask(sum_, words))
            mask_s += seconds / m
            total += hidden
            people[name].settle(sum_)
        survivors = {sum_: names}
        signatures = {name: one.agree(survivors) for name, one in people.items()}
        answers = {name: people[name].unmask(survivors, signatures)[sum_] for name in names[: server.limit]}
        _, seconds = timed(
            lambda total=total, answers=answers, sum_=sum_: server.unmask(sum_, total, names, answers)
        )
        unmask_s += seconds
        assert np.array_equal(unpack_counts(total, bits, n_weights), m * masks.astype(np.uint64)), "wrong sum"
    return {
        "participants": m,
        "threshold": server.limit,
        "bits per weight": round(64 * len(words) / n_weights, 3),
        "update, kB": round(8 * len(words) / 1e3, 1),
        "once: s per participant": round(once / m / n_blocks, 4),
        "once: kB up per block": round(up / m / n_blocks / 1e3, 2),
        "once: kB down per block": round(down / m / n_blocks / 1e3, 2),
        "pack, s": round(pack_s / n_blocks, 4),
        "mask, s": round(mask_s / n_blocks, 4),
        "server unmasks, s": round(unmask_s / n_blocks, 4),
    }


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


if __name__ == "__main__":
    main()
