"""What is refused before the long computation, in one process and in a federation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedprllm.config import PruneConfig
from fedprllm.core.criteria import CRITERIA
from fedprllm.deciding import decision_of
from fedprllm.errors import ConfigError
from fedprllm.models.block import Linear
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.strategies import STRATEGIES
from fedprllm.sharing import SHARING, update_bytes

__all__ = ["check_message_size", "check_pattern_divides", "check_update_size", "needed_bytes"]


# What names, headers and the engine add to the values of an update, at most.
_ENVELOPE = 1.02


def check_pattern_divides(model: BlockwiseModel, config: PruneConfig) -> None:
    """Refuse an N:M pattern that does not divide the inputs of every Linear.

    Raises:
        ConfigError: Names the first Linear.
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


def check_update_size(model: BlockwiseModel, config: PruneConfig) -> None:
    """Refuse to share more than the user allows, before anything is computed.

    Raises:
        ConfigError: Names the first block, its megabytes and the limit.
    """
    if config.max_update_mb is None:
        return
    sharing = SHARING[config.share]
    for index, linears in enumerate(model.linears):
        megabytes = update_bytes(sharing.shapes(linears)) / 1e6
        if megabytes > config.max_update_mb:
            raise ConfigError(
                f"share {config.share} would send {megabytes:.3g} MB of block {index}, allowed are "
                f"{config.max_update_mb:g} MB (max_update_mb): share statistics or mask, or allow more"
            )


def check_message_size(model: BlockwiseModel, config: PruneConfig, max_message_mb: float) -> None:
    """Refuse a run whose updates, or whose decisions where participants wait for them, could not arrive.

    Raises:
        ConfigError: Names the first block, its megabytes and the limit.
    """
    for index, linears in enumerate(model.linears):
        n_bytes = update_bytes(SHARING[config.share].shapes(linears))
        if STRATEGIES[config.strategy].follows_server:
            n_bytes = max(n_bytes, _decision_bytes(linears, config))
        if n_bytes * _ENVELOPE > max_message_mb * 1e6:
            raise ConfigError(
                f"block {index} takes messages of {n_bytes * _ENVELOPE / 1e6:.1f} MB, the kits of this "
                f"federation allow {max_message_mb:g} MB: share masks, or allow more in every kit's "
                "local/comm_config.json and as max_message_mb in federation.json"
            )


def _decision_bytes(linears: Mapping[str, Linear], config: PruneConfig) -> int:
    """Payload of the server's decision about a block: masks where they tell all of it, else weights."""
    masks_tell_all = decision_of(config).only_zeroes and not config.scale_weights
    return sum(
        (linear.n_weights + 7) // 8 if masks_tell_all else linear.n_weights * linear.dtype.itemsize
        for linear in linears.values()
    )


def needed_bytes(model: BlockwiseModel, participants: Sequence[Participant], config: PruneConfig) -> int:
    """What a run writes at most: its model(s), the votes, and hidden states: twice, and what spills."""
    strategy = STRATEGIES[config.strategy]
    n_models = 1 if strategy.server_votes or strategy.pools_text else len(participants)
    hidden_size = model.config.get_text_config().hidden_size
    n_tokens = sum(participant.n_tokens for participant in participants)
    state = n_tokens * hidden_size * model.dtype.itemsize if CRITERIA[config.criterion].uses_inputs else 0
    n_states = 2 if config.memory_limit is None else 3
    n_votes = n_tokens if config.weighting == "tokens" else len(participants)
    votes = model.n_prunable * n_votes.bit_length() // 8
    return n_models * model.checkpoint.n_bytes + votes + n_states * state
