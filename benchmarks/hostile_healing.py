"""What one hostile participant can do to a healing, in the clear and under masks.

The trained small model of the tests, half of its weights pruned by magnitude, is healed by 4 or 16
participants with prose, code or tables, one of which sends another gradient than its own. In the clear, a
gradient that is out of proportion to the others' is refused by name; under masks it counts. The loss is the
mean over held-out text of the honest participants.

    python -m benchmarks.hostile_healing [--rounds 30] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._harness import SEED, machine
from benchmarks.hostile import SMALL_MODEL
from fedprllm import Documents, HealConfig, PruneConfig, prune
from fedprllm.errors import UpdateError
from fedprllm.healing.bounds import FACTOR, outstanding_gradients
from fedprllm.healing.in_process import Learner
from fedprllm.healing.participant import HealingText
from fedprllm.healing.round_sums import GRADIENTS, RoundSums
from fedprllm.healing.server import HealingServer
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.inputs import make_participants
from tests.library_text import KINDS, library_text

_CHARACTERS = 24_000  # of each participant's text
_NOISE = torch.Generator().manual_seed(SEED)

# What the hostile participant makes of its gradient.
_ATTACKS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda gradient: gradient,
    "sign flipped": lambda gradient: -gradient,
    f"sign flipped, {FACTOR - 5:g} times as long": lambda gradient: -(FACTOR - 5) * gradient,
    "sign flipped, 1000 times as long": lambda gradient: -1000 * gradient,
    "noise as long": lambda gradient: _noise(gradient),
    "noise, 1000 times as long": lambda gradient: 1000 * _noise(gradient),
}


def _noise(like: Tensor) -> Tensor:
    noise = torch.randn(like.shape, generator=_NOISE)
    return noise * like.norm() / noise.norm()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="few rounds, to check that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, counts = (3, (4,)) if options.quick else (options.rounds, (4, 16))
    with tempfile.TemporaryDirectory() as folder:
        pruned = _pruned(Path(folder))
        rows = [
            _row(pruned, n, attack, rounds, options.length, masked, Path(folder))
            for n in counts
            for masked in (False, True)
            for attack in _ATTACKS
        ]
    result = {"benchmark": "hostile_healing", "quick": options.quick, "rounds": rounds, "rows": rows}
    print(json.dumps(result | {"machine": machine()}))


def _pruned(folder: Path) -> Path:
    config = PruneConfig(criterion="magnitude", windows=1, window_length=64)
    texts = [Documents([library_text("prose")[:_CHARACTERS]])]
    return prune(SMALL_MODEL, texts, config, out=folder / "run").model_dir


def _row(
    pruned: Path, n: int, attack: str, rounds: int, length: int, masked: bool, folder: Path
) -> dict[str, Any]:
    config = HealConfig(rounds=rounds, windows=24, window_length=length, learning_rate=0.01, check_every=5)
    model = BlockwiseModel(pruned)
    texts = {f"p{number:02d}": _text(number) for number in range(n)}
    members, _ = make_participants(model, texts, config.reading)
    parts = [HealingText(member) for member in members]
    _NOISE.manual_seed(SEED)
    refused = False
    with Learner(model, config, folder / "states") as learner:
        server = HealingServer(learner.tunable.initial(), config)
        while not server.is_finished:
            sums = learner.contribute(parts, server.vector, server.number)
            sums["p00"] = _changed(sums["p00"], _ATTACKS[attack])
            if not masked:
                for name in _refused(sums, config):
                    del sums[name]
                    refused = True
            try:
                server.take(sum(sums.values(), start=RoundSums.zeros(learner.tunable.n)))
            except UpdateError:
                break
        honest = parts[1:]
        before, after = (
            _loss(learner, honest, vector) for vector in (learner.tunable.initial(), server.result)
        )
    row = {
        "participants": n,
        "seen by the server": "sums" if masked else "each gradient",
        "attack": attack,
        "refused by name": "yes" if refused else "no",
        "taken back": server.n_taken_back,
        "perplexity before": round(math.exp(before), 2),
        "perplexity healed": round(math.exp(after), 2),
    }
    print(row, file=sys.stderr)
    return row


def _refused(sums: dict[str, RoundSums], config: HealConfig) -> set[str]:
    """Whom the coordinator refuses by name: one that no window can have made, or out of proportion."""
    too_long = {
        name for name, one in sums.items() if one.exceeds(config.round_windows, config.max_gradient_norm)
    }
    return too_long | set(outstanding_gradients({name: sums[name] for name in sums if name not in too_long}))


def _text(number: int) -> Documents:
    text = library_text(KINDS[number % len(KINDS)])
    start = (number // len(KINDS)) * _CHARACTERS % max(1, len(text) - _CHARACTERS)
    return Documents([text[start : start + _CHARACTERS]])


def _changed(sums: RoundSums, change: Callable[[Tensor], Tensor]) -> RoundSums:
    words = sums.words.clone()
    gradient = words[:-4].to(torch.float32) * GRADIENTS.spacing
    limited = change(gradient).clamp(-GRADIENTS.limit * 0.9, GRADIENTS.limit * 0.9)
    words[:-4] = GRADIENTS.words(GRADIENTS.rounded(limited))[0]
    return RoundSums(words)


def _loss(learner: Learner, texts: list[HealingText], vector: Tensor) -> float:
    """Mean loss on the held-out windows of the honest participants."""
    number = learner.config.rounds  # the round that only measures
    found = learner.contribute(texts, vector, number).values()
    return sum(found, start=RoundSums.zeros(learner.tunable.n)).held_out_loss


def worst(result: dict[str, Any], seen: str) -> float:
    """Largest perplexity under attack, relative to the honest one."""
    ratios = []
    for n in {row["participants"] for row in result["rows"]}:
        rows = [
            row for row in result["rows"] if row["participants"] == n and row["seen by the server"] == seen
        ]
        honest = next(row["perplexity healed"] for row in rows if row["attack"] == "none")
        ratios += [row["perplexity healed"] / honest for row in rows]
    return max(ratios)


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The section's table."""
    return {"": result["rows"]}


if __name__ == "__main__":
    main()
