"""Structures whose removal makes the blocks of a model smaller by at least a given fraction.

To add a way, write a function that yields structures, the least that suffices first, and add a row to `WAYS`.
It raises a `ConfigError` if none suffices, and yields nothing for a model without such parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from fedprllm.config import PruneConfig
from fedprllm.core.solvers.channels import next_width
from fedprllm.deciding.narrow import kept_units
from fedprllm.errors import ConfigError, ModelError
from fedprllm.models.block import Channels
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.fewer_experts import experts_of
from fedprllm.models.smaller import block_sizes, part_of
from fedprllm.pruning.preflight import check_structure, check_update_size

__all__ = ["WAYS", "Candidates", "find_candidates"]


@dataclass(frozen=True)
class Candidates:
    """The structures to choose among.

    Attributes:
        structures: As in `PruneConfig.structure`, each removing at least the wanted fraction.
        refused: Why the other ways to make the model smaller are not among them, by name.
    """

    structures: list[str]
    refused: dict[str, str]


def find_candidates(model: BlockwiseModel, config: PruneConfig, n_participants: int = 1) -> Candidates:
    """The least of each kind of structure that removes ``config.smaller`` of the blocks' parameters.

    Args:
        model: The dense model.
        config: How to prune.
        n_participants: Number of participants; under masks, an update grows with it.

    Raises:
        ConfigError: There is none; the message says why, for every kind.
    """
    assert config.smaller is not None, "the run chooses a structure"
    fraction = Fraction(str(config.smaller))
    structures, refused = [], {}
    for name, way in WAYS.items():
        try:
            structures += _first_usable(model, config, n_participants, way(model, fraction))
        except (ConfigError, ModelError) as error:
            refused[name] = str(error)
    if not structures:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in refused.items())
        raise ConfigError(
            f"smaller {config.smaller:g}: nothing that can be removed from {model.folder} makes its blocks "
            f"{float(fraction):.1%} smaller: ask for less, or use another model\n{reasons}"
        )
    return Candidates(structures, refused)


def _first_usable(
    model: BlockwiseModel, config: PruneConfig, n_participants: int, structures: Iterator[str]
) -> list[str]:
    """The first structure that a run would not refuse; empty if there is none to try.

    Raises:
        ConfigError, ModelError: Why a run would refuse the first one, if it would refuse all.
    """
    refusals: list[ConfigError | ModelError] = []
    for structure in structures:
        try:
            trial = config.with_structure(structure)
            check_structure(model, trial)
            check_update_size(model, trial, n_participants)
        except (ConfigError, ModelError) as error:
            refusals.append(error)
        else:
            return [structure]
    if refusals:
        raise refusals[0]
    return []


# Ways ------------------------------------------------------------------------------------------


def _mlp(model: BlockwiseModel, fraction: Fraction) -> Iterator[str]:
    yield f"mlp={_spelled(part_of(model, 'mlp'), _fewest(model, 'mlp', fraction))}"


def _heads(model: BlockwiseModel, fraction: Fraction) -> Iterator[str]:
    heads = part_of(model, "heads")
    for n in range(_fewest(model, "heads", fraction), heads.n_units, heads.n_groups):
        yield f"heads={n}"


def _mlp_and_heads(model: BlockwiseModel, fraction: Fraction) -> Iterator[str]:
    """About the fraction of the heads, and as many channels as are needed beside them, if any are."""
    heads, channels = part_of(model, "heads"), part_of(model, "mlp")
    share = max(1, round(fraction * heads.n_units / heads.n_groups)) * heads.n_groups
    most = heads.n_units - heads.n_groups
    for n in range(min(share, most), most + 1, heads.n_groups) if most else ():
        rest = fraction - _gone(model, "heads", n)
        if rest > 0:
            yield f"mlp={_spelled(channels, _fewest(model, 'mlp', rest))},heads={n}"


def _depth(model: BlockwiseModel, fraction: Fraction) -> Iterator[str]:
    """Enough blocks even if the smallest ones go."""
    sizes = sorted(block_sizes(model))
    wanted = fraction * sum(sizes)
    yield f"depth={1 + sum(total < wanted for total in accumulate(sizes))}"


def _experts(model: BlockwiseModel, fraction: Fraction) -> Iterator[str]:
    """Enough experts without counting the rows of the router that go with them."""
    if not any(model.experts):
        return
    experts = experts_of(model)
    first = [f"{name}.0." for name in experts.paths if name]
    sizes = model.skeleton.named_parameters()
    each = sum(tensor.numel() for name, tensor in sizes if name.startswith(tuple(first)))
    wanted = math.ceil(fraction * sum(block_sizes(model)) / (each * experts.n_groups))
    yield f"experts={wanted * experts.n_groups}"


WAYS: dict[str, Callable[[BlockwiseModel, Fraction], Iterator[str]]] = {
    "mlp": _mlp,
    "heads": _heads,
    "mlp and heads": _mlp_and_heads,
    "depth": _depth,
    "experts": _experts,
}


_UNITS = {"mlp": "channels", "heads": "heads"}


def _gone(model: BlockwiseModel, part: str, n: int) -> Fraction:
    """Fraction of the blocks' parameters that goes with n units of every block."""
    after = block_sizes(model, {part: part_of(model, part).n_units - n})
    return 1 - Fraction(sum(after), sum(block_sizes(model)))


def _fewest(model: BlockwiseModel, part: str, fraction: Fraction) -> int:
    """Fewest units of every block with which the fraction of the blocks' parameters goes.

    Raises:
        ConfigError: It does not go even with all but the fewest that must stay.
    """
    units = part_of(model, part)
    step = units.n_units - next_width(units.n_units) if part == "mlp" else units.n_groups
    n = math.ceil(fraction / _gone(model, part, step)) * step
    most = units.n_units - step
    if n > most:
        raise ConfigError(
            f"removing {most} of {units.n_units} {_UNITS[part]} from every block, the most that can go, "
            f"makes the blocks {float(_gone(model, part, most)):.1%} smaller"
        )
    return n


def _spelled(channels: Channels, n: int) -> str:
    """The shortest decimal fraction for which a run removes this number of channels."""
    for digits in range(1, 20):
        text = f"{n / channels.n_units:.{digits}f}"
        if channels.n_units - kept_units(channels, Fraction(text)) == n:
            return text
    raise AssertionError("a fraction with enough digits is rounded to its number of channels")
