"""From the sum of words to the sums of a block, with the checks that need no single update."""

from __future__ import annotations

from typing import Any

from fedprllm.errors import UpdateError
from fedprllm.models.block import Block
from fedprllm.models.norms import input_norms
from fedprllm.pruning.method import Method
from fedprllm.secure.words import Words
from fedprllm.sharing import Totals
from fedprllm.sharing.as_words import Layout
from fedprllm.sharing.interface import Ballot, ExactSums
from fedprllm.sharing.outlier_counts import OUTLIERS, check_count
from fedprllm.sharing.prune_masks import check_votes
from fedprllm.sharing.pruned_weights import mask_name

__all__ = ["layout_of", "totals_of"]


def layout_of(block: Block, method: Method[Any], n_participants: int) -> Layout:
    """The layout of updates of a block in a run with so many participants."""
    config = method.config
    assert config.window_length is not None, "the configuration is resolved"
    max_windows = config.windows if config.weighting == "tokens" else 0
    return Layout(method.empty(block), n_participants, config.window_length, max_windows)


def totals_of(words: Words, n_added: int, block: Block, method: Method[Any], n_participants: int) -> Totals:
    """The sums of a block from the sum of words, without masks.

    Args:
        words: Sum of the words of ``n_added`` updates.
        n_added: Number of updates.
        block: The block, unpruned.
        method: What participants share.
        n_participants: Number of participants of the run.

    Raises:
        UpdateError: Honest participants cannot add up to it. Nobody can say whose update is at fault.
    """
    try:
        totals = layout_of(block, method, n_participants).unpack(words, n_added)
        _check(totals, block, method)
    except UpdateError as error:
        raise UpdateError(
            f"block {block.index}: the sum over {n_added} participants cannot come from honest updates: "
            f"{error}. Under masks nobody can say whose update it is: run without secure"
        ) from None
    return totals


def _check(totals: Totals, block: Block, method: Method[Any]) -> None:
    """Check sums as far as they can be checked without the updates behind them."""
    config = method.config
    assert config.window_length is not None, "the configuration is resolved"
    most = totals.n_participants * config.windows * config.window_length
    if totals.n_tokens < totals.n_participants or (config.windows and totals.n_tokens > most):
        raise UpdateError(f"{totals.n_tokens} tokens, expected at most {most}")
    for name, linear in block.linears.items():
        votes = totals.votes.get(name) or totals.votes.get(mask_name(name))
        if votes is not None:
            check_votes(linear, votes, totals.weight, method.target)
    if isinstance(totals.sums, ExactSums):
        values = {name: part.value for name, part in totals.sums.parts.items()}
        _check_sums(Ballot(block.linears, values, block.tensors.__getitem__), totals, method)


def _check_sums(ballot: Ballot, totals: Totals, method: Method[Any]) -> None:
    if method.sharing is OUTLIERS:
        check_count(ballot, method.target, totals.n_participants)
        return
    method.sharing.check(ballot, method.target)
    if (comparison := method.sharing.comparison) is not None:
        figures = {"the sum": comparison.figures(ballot.update, ballot.linears, totals.n_tokens)}
        for reason in comparison.outstanding(figures, input_norms(ballot.linears)).values():
            raise UpdateError(reason)
