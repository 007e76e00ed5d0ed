"""One hostile participant among several: what it can do to the pruned model, for every way of sharing.

Honest participants with four kinds of text compute their updates once. For each attack, one participant's
updates are replaced, and all are encoded, checked, compared, added up and decided by the coordinator's own
code. Either the attacker is refused and named, or the perplexity of the attacked model (held-out text of all
kinds) stands beside that of the honest one. Goal: refused, or within 5 %. Under masks (secure), the
coordinator sees sums only: it can end the run, and cannot name anyone.

    python -m benchmarks.hostile [--model FOLDER] [--participants 4 16] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks._attacks import ATTACKS, Attack, Scene
from benchmarks._harness import machine
from benchmarks._masked_attacks import MASKED_ATTACKS, MaskedAttack, MaskedScene
from benchmarks._texts import read_texts
from fedprllm import PruneConfig, UpdateError
from fedprllm.core.owl import Outliers
from fedprllm.evaluation.perplexity import perplexities
from fedprllm.federation.coordinator.ballots import Ballots
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.names import to_wire
from fedprllm.models.block import Block
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.pruning.aggregate import Aggregate
from fedprllm.pruning.masked_totals import layout_of, totals_of
from fedprllm.pruning.method import Method, pruning_method, survey_method
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.survey import allocated
from fedprllm.pruning.walk import Walker
from fedprllm.sharing.bounds import ratios_to_others

SMALL_MODEL = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "small-model"
WAYS: dict[str, dict[str, Any]] = {
    "mask": {"share": "mask"},
    "statistics": {"share": "statistics"},
    "statistics, trimmed": {"share": "statistics", "aggregation": "trimmed"},
    "gram": {"share": "gram"},
    "weights": {"share": "weights"},
    "outliers (OWL, masks)": {"share": "mask", "allocation": "owl"},
    "mask, under masks": {"share": "mask"},
    "statistics, under masks": {"share": "statistics"},
    "gram, under masks": {"share": "gram"},
    "outliers, under masks": {"share": "mask", "allocation": "owl"},
}
_MASKED = ", under masks"
_RUN_ID, _DIGEST = bytes(16), bytes(32)
_GOAL_PERCENT = 5.0
# Updates by block and participant.
Updates = list[dict[str, dict[str, Tensor]]]


@dataclass
class Setting:
    """What all cells of one number of participants share."""

    model: BlockwiseModel
    participants: list[Participant]
    texts: Mapping[str, Sequence[Tensor]]
    folder: Path
    honest: dict[str, Any] = field(default_factory=dict)

    @property
    def hostile(self) -> str:
        return self.participants[-1].name

    @property
    def n_tokens(self) -> dict[str, int]:
        return {participant.name: participant.n_tokens for participant in self.participants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF file [the tests' small model]")
    parser.add_argument("--participants", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--windows", type=int, default=16, help="windows per participant")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="more do not help with a model this small")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--quick", action="store_true", help="two attacks per way, to check that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = BlockwiseModel(resolve_model(options.model or SMALL_MODEL))
    rows: list[dict[str, Any]] = []
    dense, ratios = 0.0, {}
    with tempfile.TemporaryDirectory() as temporary:
        for n in options.participants:
            texts = read_texts(model, Path(temporary) / "texts", n, options.windows, options.length)
            setting = Setting(model, texts.participants, texts.held_out, Path(temporary))
            dense = dense or _perplexity(setting)
            ratios[n] = _largest_honest_ratio(setting)
            for way in options.ways:
                rows += _measured(setting, way, options.quick)
    print(json.dumps(_result(rows, dense, options) | {"largest_honest_ratio": ratios}))


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """A table for every way of sharing: attacks in rows, numbers of participants in columns."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        line = found.setdefault(row["way"], {}).setdefault(row["attack"], {"attack": row["attack"]})
        line[f"{row['participants']} participants"] = _outcome(row)
    return {way: list(lines.values()) for way, lines in found.items()}


def _outcome(row: dict[str, Any]) -> str:
    if row["percent"] is None:
        return "the run ends" if row["way"].endswith(_MASKED) else "refused, named"
    digits = ".2f" if row["attacked"] < 1000 else ",.0f"
    change = f"{row['honest']:.2f} → {row['attacked']:{digits}} ({row['percent']:+,.1f} %)"
    return change if row["met"] else f"**{change}**"


def _largest_honest_ratio(setting: Setting) -> float:
    """The largest honest sums of squares, in units of the others' median (the limit is `FACTOR`)."""
    method = pruning_method(PruneConfig(share="statistics"))
    assert method.sharing.comparison is not None
    largest = 0.0
    for index, updates in enumerate(_honest(setting, method)):
        figures = [
            method.sharing.comparison.figures(update, setting.model.linears[index], setting.n_tokens[name])
            for name, update in updates.items()
        ]
        for source in figures[0]:
            ratios = ratios_to_others(torch.stack([figure[source] for figure in figures]))
            largest = max(largest, *(float(ratio.max()) for ratio in ratios))
    return largest


def _result(rows: list[dict[str, Any]], dense: float, options: argparse.Namespace) -> dict[str, Any]:
    def worst(is_meant: Callable[[str], bool]) -> float | None:
        changes = [row["percent"] for row in rows if row["percent"] is not None and is_meant(row["way"])]
        return max(changes, default=None)

    return {
        "benchmark": "hostile",
        "quick": options.quick,
        "model": Path(options.model or SMALL_MODEL).name,
        "windows": options.windows,
        "window_length": options.length,
        "dense": dense,
        "rows": rows,
        "n_attacks": len(rows),
        "n_missed": sum(not row["met"] for row in rows),
        "worst_percent": worst(lambda way: not way.endswith(_MASKED)),
        "worst_percent_robust": worst(
            lambda way: not way.endswith(_MASKED) and way not in ("statistics", "gram")
        ),
        "worst_percent_masked": worst(lambda way: way.endswith(_MASKED)),
        "machine": machine(),
    }


def _measured(setting: Setting, way: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every attack on one way of sharing."""
    config = PruneConfig(windows=0, window_length=setting.participants[0].windows.shape[1], **WAYS[way])
    kind = "outliers" if config.allocation == "owl" else config.share
    pruned, attacks = (
        (_pruned_masked, MASKED_ATTACKS[kind]) if way.endswith(_MASKED) else (_pruned, ATTACKS[kind])
    )
    honest = pruned(setting, config, None)
    if isinstance(honest, UpdateError):
        raise honest
    for name, attack in list(attacks.items())[: 2 if quick else None]:
        attacked = pruned(setting, config, attack)
        row = _row(setting, way, name, honest, attacked)
        print(row, file=sys.stderr)
        yield row


def _row(
    setting: Setting, way: str, attack: str, honest: float, attacked: float | UpdateError
) -> dict[str, Any]:
    row = {"way": way, "participants": len(setting.participants), "attack": attack, "honest": honest}
    if isinstance(attacked, UpdateError):
        return row | {"attacked": "refused", "percent": None, "met": True, "reason": str(attacked)}
    percent = 100 * (attacked / honest - 1)
    return row | {"attacked": attacked, "percent": percent, "met": percent <= _GOAL_PERCENT, "reason": ""}


def _pruned(setting: Setting, config: PruneConfig, attack: Attack | None) -> float | UpdateError:
    """Perplexity of the model that the coordinator makes, or why it refuses the attacker."""
    method, surveyed = pruning_method(config), attack if config.allocation == "owl" else None
    try:
        if config.allocation == "owl":
            outliers = _surveyed(setting, config, surveyed)
            method = method.with_sparsities(allocated(setting.model, outliers, config))
            attack = None
        with _ballots(setting, method, attack) as ballots:
            names = list(setting.n_tokens)
            return _perplexity(setting, lambda block: ballots.add_up(block, names)[0].decide().weights)
    except UpdateError as error:
        return error


def _surveyed(setting: Setting, config: PruneConfig, attack: Attack | None) -> list[Outliers]:
    method = survey_method(config)
    found = []
    with _ballots(setting, method, attack) as ballots:
        for index in range(setting.model.n_blocks):
            with setting.model.block(index) as block:
                found.append(ballots.add_up(block, list(setting.n_tokens))[0].decide())
    return found


def _pruned_masked(setting: Setting, config: PruneConfig, attack: MaskedAttack | None) -> float | UpdateError:
    """The same under masks. The masks themselves are left out, because they cancel out in every sum."""
    method = pruning_method(config)
    try:
        if config.allocation == "owl":
            survey, outliers = survey_method(config), []
            for index in range(setting.model.n_blocks):
                with setting.model.block(index) as block:
                    outliers.append(_masked(setting, survey, block, attack).decide())
            method = method.with_sparsities(allocated(setting.model, outliers, config))
            attack = None
        return _perplexity(setting, lambda block: _masked(setting, method, block, attack).decide().weights)
    except UpdateError as error:
        return error


def _masked(
    setting: Setting, method: Method[Any], block: Block, attack: MaskedAttack | None
) -> Aggregate[Any]:
    """Add up words as a coordinator does, and check the sum.

    Raises:
        UpdateError: Honest participants cannot add up to it.
    """
    updates = _honest(setting, method)[block.index]
    layout = layout_of(block, method, len(updates))
    words = {name: layout.pack(update, setting.n_tokens[name]) for name, update in updates.items()}
    if attack is not None:
        scene = _scene(setting, method, block.index, updates)
        words[setting.hostile] = attack(MaskedScene(scene, layout, _own_scores(setting, scene, block.index)))
    total = np.add.reduce(list(words.values()), dtype=np.uint64)
    aggregate = Aggregate(block, method)
    aggregate.take(totals_of(total, len(words), block, method, len(words)), list(words))
    return aggregate


def _own_scores(setting: Setting, scene: Scene, index: int) -> dict[str, Tensor]:
    """The attacker's own scores of the weights, from its own text."""
    sums = _honest(setting, pruning_method(PruneConfig(share="statistics")))[index][setting.hostile]
    return {
        name: scene.weights[name].abs() * sums[linear.source].sqrt() for name, linear in scene.linears.items()
    }


@contextmanager
def _ballots(setting: Setting, method: Method[Any], attack: Attack | None) -> Iterator[Ballots[Any]]:
    """The coordinator's store with all updates, after it has checked and compared them.

    Raises:
        UpdateError: It refuses the attacker's update.
    """
    honest = _honest(setting, method)
    with tempfile.TemporaryDirectory(dir=setting.folder) as temporary:
        ballots = Ballots(setting.model, method, _RUN_ID, _DIGEST, lambda index: Path(temporary, str(index)))
        for index, updates in enumerate(honest):
            if attack is not None:
                scene = _scene(setting, method, index, updates)
                updates = updates | {setting.hostile: attack(scene)}
            for name, update in updates.items():
                message = _message(setting, method, index, name, update)
                _check_and_keep(setting, name, ballots, index, message)
            _compare(setting, ballots, index)
        yield ballots


def _check_and_keep(setting: Setting, name: str, ballots: Ballots[Any], index: int, message: bytes) -> None:
    """Check an update as the coordinator does, and keep it."""
    try:
        ballots.check(index, name, message)
    except UpdateError:
        assert name == setting.hostile, f"{name} is honest"
        raise
    path = ballots.path(index, name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(message)


def _compare(setting: Setting, ballots: Ballots[Any], index: int) -> None:
    refused = ballots.outstanding(index, list(setting.n_tokens))
    assert set(refused) <= {setting.hostile}, refused
    for reason in refused.values():
        raise UpdateError(reason)


def _honest(setting: Setting, method: Method[Any]) -> Updates:
    """All honest updates; each walk is computed once."""
    key = f"{method.sharing.kind} {sorted(method.target.sparsities.items())}"
    if key not in setting.honest:
        model, updates = setting.model, [{} for _ in range(setting.model.n_blocks)]
        for participant in setting.participants:
            walker = Walker(participant, method, model.n_blocks)
            walker.enter(model)
            for index in range(model.n_blocks):
                with model.block(index) as block:
                    contribution = walker.contribute(block)
                    updates[index][participant.name] = contribution.update or {}
                    walker.advance(block, contribution.weights)
        setting.honest[key] = updates
    found: Updates = setting.honest[key]
    return found


def _scene(setting: Setting, method: Method[Any], index: int, updates: dict[str, Any]) -> Scene:
    n_tokens, linears = setting.n_tokens, setting.model.linears[index]
    stored = setting.model.checkpoint.load(linears)
    return Scene(
        linears=linears,
        own=updates[setting.hostile],
        others=[(updates[name], n_tokens[name]) for name in updates if name != setting.hostile],
        n_tokens=n_tokens[setting.hostile],
        weights={name: linear.view(stored) for name, linear in linears.items()},
        norms=setting.model.input_norms(index),
        target=method.target,
        seed=index,
    )


def _message(
    setting: Setting, method: Method[Any], index: int, name: str, update: Mapping[str, Tensor]
) -> bytes:
    """The message of an update. A sender need not run our checks."""
    message = wire.Update(
        run_id=_RUN_ID,
        participant=name,
        block=index,
        kind=method.sharing.kind,
        model_fingerprint=_DIGEST,
        tensors=to_wire(update, setting.model.linears[index]),
        n_tokens=setting.n_tokens[name],
    )
    with patch.object(wire, "_check_values"):
        return wire.encode(message)


def _perplexity(setting: Setting, weights_of: Any = None) -> float:
    """Perplexity on all held-out text together."""
    measured = perplexities(
        setting.model, setting.texts, **({"weights_of": weights_of} if weights_of else {})
    )
    n_tokens = sum(one.n_tokens for one in measured)
    return math.exp(sum(one.nll * one.n_tokens for one in measured) / n_tokens)


if __name__ == "__main__":
    main()
