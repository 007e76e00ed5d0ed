"""Checks that run before the long computation, both in one process and in a federation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fedprllm.config import PruneConfig
from fedprllm.core.criteria import CRITERIA
from fedprllm.core.solvers.channels import next_width
from fedprllm.deciding import decision_of
from fedprllm.deciding.narrow import kept_units
from fedprllm.deciding.parts import n_removed
from fedprllm.errors import ConfigError, ModelError
from fedprllm.models.block import Linear
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.fewer_experts import experts_of, fewer_experts
from fedprllm.models.shorter import shorter_config
from fedprllm.models.smaller import fitting_config, part_of
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.strategies import STRATEGIES
from fedprllm.sharing import SHARING, update_bytes
from fedprllm.sharing.as_words import masked_bytes

if TYPE_CHECKING:
    from fedprllm.pruning.secure_sums import SecureSums

__all__ = [
    "check_message",
    "check_message_size",
    "check_pattern_divides",
    "check_secure",
    "check_structure",
    "check_update_size",
    "decision_bytes",
    "need_cryptography",
    "needed_bytes",
    "payloads",
    "secure_sums",
]


# Upper bound on what names, headers and the engine add to the values of an update.
_ENVELOPE = 1.02


def check_pattern_divides(model: BlockwiseModel, config: PruneConfig) -> None:
    """Refuse an N:M pattern if M does not divide the number of inputs of every Linear.

    Raises:
        ConfigError: M does not divide a Linear's inputs; the message names the first such Linear.
    """
    if config.n_m is None:
        return
    for block in model.linears:
        for linear in block.values():
            if linear.shape[1] % config.n_m[1]:
                raise ConfigError(
                    f"pattern {config.pattern} does not divide the {linear.shape[1]} inputs of "
                    f"'{linear.name}': choose M among the divisors of {linear.shape[1]}"
                )


def check_structure(model: BlockwiseModel, config: PruneConfig) -> None:
    """Refuse to remove parts that the model does not have, or without which transformers cannot load it.

    Raises:
        ModelError: It has no such parts, or no configuration describes the smaller model.
        ConfigError: Nothing would be removed.
    """
    kept = {}
    for part, amount in config.structures.items():
        if part == "depth":
            _check_depth(model, n_removed(model.n_blocks, amount))
            continue
        if part == "experts":
            _check_experts(model, amount)
            continue
        channels = part_of(model, part)
        n, groups = channels.n_units, channels.n_groups
        left = kept_units(channels, amount)
        if left == n and amount:
            least = f"{part}={n - next_width(n) if part == 'mlp' else groups}"
            raise ConfigError(
                f"structure {part}={float(amount):g} would remove none of {n} after rounding: remove more, "
                f"at least {least}, or use another model"
            )
        if left < groups or (n - left) % groups:
            each = f", the same number from each of {groups} groups of heads" if groups > 1 else ""
            raise ConfigError(
                f"structure {part}={float(amount):g} would leave {left} of {n}: expected at least {groups}"
                f"{each}; remove another number"
            )
        if left < n:
            kept[part] = left
    if kept:
        fitting_config(model, kept)


def _check_depth(model: BlockwiseModel, n: int) -> None:
    if not 0 < n < model.n_blocks:
        raise ConfigError(
            f"structure depth would drop {n} of {model.n_blocks} blocks: expected 1 to {model.n_blocks - 1}"
        )
    shorter_config(model, range(model.n_blocks - n))


def _check_experts(model: BlockwiseModel, amount: Fraction) -> None:
    experts = experts_of(model)
    n, each = experts.n_experts, f", the same number from each of {experts.n_groups} groups of experts"
    if n <= experts.n_groups:
        raise ModelError(
            f"each block has {n} experts in {experts.n_groups} groups: expected several in a group; "
            "use another model, or prune single weights"
        )
    removed = n_removed(n, amount, experts.n_groups)
    if not 0 < removed < n or removed % experts.n_groups:
        raise ConfigError(
            f"structure experts={float(amount):g} would remove {removed} of {n} experts: expected "
            f"{experts.n_groups} to {n - experts.n_groups}{each if experts.n_groups > 1 else ''}; remove "
            "another number"
        )
    if experts.n_reachable(n - removed) < experts.n_chosen:
        raise ConfigError(
            f"structure experts={float(amount):g} would leave {n - removed} of {n} experts, among which a "
            f"router could choose {experts.n_reachable(n - removed)} for a token: expected at least the "
            f"{experts.n_chosen} that it chooses; remove fewer"
        )
    fewer_experts(model, n - removed)


def payloads(model: BlockwiseModel, config: PruneConfig, kind: str, n_participants: int) -> list[int]:
    """Payload in bytes of one participant's update of each block.

    Args:
        model: The model.
        config: The resolved configuration.
        kind: Kind of update.
        n_participants: Number of participants; under masks, an update grows with it.
    """
    sharing = SHARING[kind]
    if not config.secure:
        return [update_bytes(sharing.shapes(linears)) for linears in model.linears]
    max_windows = config.windows if config.weighting == "tokens" else 0
    return [masked_bytes(sharing, linears, n_participants, max_windows) for linears in model.linears]


def check_update_size(model: BlockwiseModel, config: PruneConfig, n_participants: int = 1) -> None:
    """Refuse to share more than the user allows, before anything is computed.

    Args:
        model: The model.
        config: The resolved configuration.
        n_participants: Number of participants; under masks, an update grows with it.

    Raises:
        ConfigError: An update would exceed ``max_update_mb``; the message names the first such block, its
            size and the limit.
    """
    if config.max_update_mb is None:
        return
    for index, n_bytes in enumerate(payloads(model, config, config.share, n_participants)):
        megabytes = n_bytes / 1e6
        if megabytes > config.max_update_mb:
            raise ConfigError(
                f"share {config.share} would send {megabytes:.3g} MB for block {index}, but max_update_mb "
                f"allows {config.max_update_mb:g} MB: {_less(config, 'statistics or mask')}raise "
                "max_update_mb"
            )


def _less(config: PruneConfig, kinds: str) -> str:
    """Advice to share something smaller, if there is a choice."""
    return "" if config.structures else f"share {kinds}, or "


def check_message_size(
    model: BlockwiseModel, config: PruneConfig, max_message_mb: float, n_participants: int = 1
) -> None:
    """Refuse a run whose messages exceed the kits' limit and could never arrive.

    Messages are updates, and decisions, from which participants build the result.

    Raises:
        ConfigError: A message would be too large; the message names the first such block, the size and the
            limit.
    """
    updates = payloads(model, config, config.share, n_participants)
    for index, linears in enumerate(model.linears):
        n_bytes = max(updates[index], _block_decision_bytes(linears, config))
        check_message(f"block {index}", n_bytes, max_message_mb, _less(config, "masks"))


def check_message(what: str, n_bytes: int, max_message_mb: float, advice: str = "") -> None:
    """Refuse a message that exceeds the kits' limit and could never arrive.

    Args:
        what: What takes it, for the error.
        n_bytes: Its payload.
        max_message_mb: The limit in MB (10^6 bytes).
        advice: What else one could do.

    Raises:
        ConfigError: The message would be too large.
    """
    if n_bytes * _ENVELOPE > max_message_mb * 1e6:
        raise ConfigError(
            f"{what} takes messages of {n_bytes * _ENVELOPE / 1e6:.1f} MB, but the kits of this federation "
            f"allow {max_message_mb:g} MB: {advice}raise the limit in every kit's local/comm_config.json and "
            "max_message_mb in federation.json"
        )


def check_secure(model: BlockwiseModel, config: PruneConfig, samples: Mapping[str, Sequence[int]]) -> None:
    """Refuse secure aggregation that could not begin or would show too small sums.

    Raises:
        ConfigError: The library that it needs is not installed, or updates under masks are too large.
        SecureError: There are too few participants, or too few of them prune some block.
    """
    if not config.secure:
        return
    need_cryptography()
    from fedprllm.pruning.secure_sums import check_contributors

    check_contributors(samples, model.n_blocks)
    check_update_size(model, config, len(samples))


def need_cryptography() -> None:
    """Check that what hides updates is installed.

    Raises:
        ConfigError: It is missing.
    """
    if find_spec("cryptography") is None:
        raise ConfigError(
            "secure needs the library cryptography: install it with pip install 'fedprllm[federation]'"
        )


def secure_sums(
    samples: Mapping[str, Sequence[int]], n_blocks: int, config: PruneConfig, *, survey: bool
) -> SecureSums | None:
    """What adds updates up under masks; None if the run does not ask for it."""
    if not config.secure:
        return None
    from fedprllm.pruning.secure_sums import SecureSums

    return SecureSums(samples, n_blocks, config, survey=survey)


def decision_bytes(model: BlockwiseModel, config: PruneConfig) -> int:
    """Payload of the server's decisions about all blocks."""
    return sum(_block_decision_bytes(linears, config) for linears in model.linears)


def _block_decision_bytes(linears: Mapping[str, Linear], config: PruneConfig) -> int:
    """Payload of the server's decision about a block: masks if they determine it, weights otherwise."""
    decision = decision_of(config)
    masks_tell_all = decision.only_zeroes and not config.scale_weights
    return sum(
        (linear.n_weights + 7) // 8 if masks_tell_all else linear.n_weights * linear.dtype.itemsize
        for linear in decision.changes(linears).values()
    )


def needed_bytes(model: BlockwiseModel, participants: Sequence[Participant], config: PruneConfig) -> int:
    """Upper bound on the disk space of a run: models, votes, two sets of hidden states, spilled states."""
    strategy = STRATEGIES[config.strategy]
    n_models = 1 if strategy.server_votes or strategy.pools_text else len(participants)
    n_models += config.smaller is not None  # a candidate's, before the run's own
    hidden_size = model.config.get_text_config().hidden_size
    n_tokens = sum(participant.n_tokens for participant in participants)
    state = n_tokens * hidden_size * model.dtype.itemsize if CRITERIA[config.criterion].uses_inputs else 0
    n_states = 2 if config.memory_limit is None else 3
    n_votes = n_tokens if config.weighting == "tokens" else len(participants)
    votes = model.n_prunable * n_votes.bit_length() // 8
    return n_models * model.checkpoint.n_bytes + votes + n_states * state
