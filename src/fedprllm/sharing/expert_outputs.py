"""Share what each expert adds to its tokens, from which the server chooses the experts to remove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedprllm.core.fixed_point import FixedPointSum
from fedprllm.core.sums import ExpertStatistics
from fedprllm.errors import ModelError, UpdateError
from fedprllm.sharing.bounds import FACTOR, FEWEST, ratios_to_others
from fedprllm.sharing.interface import (
    COUNTS,
    Ballot,
    Comparison,
    ExactSums,
    Linears,
    Norms,
    Seen,
    Shapes,
    Sharing,
    Tensors,
    Totals,
    Wire,
)
from fedprllm.sharing.outlier_counts import WHOLE
from fedprllm.sharing.target import Target

__all__ = ["EXPERTS", "SCORES", "expert_scores", "n_experts", "n_values", "scores_on_grid"]

SCORES = "scores"
_SUMS, _COUNTS = "sums", "counts"


def n_experts(linears: Linears) -> int:
    """Number of experts of a block; 0 if it has none."""
    return len({linear.expert for linear in linears.values()} - {None})


def n_values(linears: Linears) -> int:
    """Length of each tensor of an update: one number for each expert, or a zero if the block has none."""
    return max(1, n_experts(linears))


def _shapes(linears: Linears) -> Shapes:
    return dict.fromkeys((_SUMS, _COUNTS), ((n_values(linears),), torch.int64))


def _contribute(seen: Seen, target: Target) -> Tensors:  # noqa: ARG001  one signature for all ways of sharing
    assert seen.experts is not None, "PruneConfig refuses experts with a criterion that uses no text"
    sums, counts = seen.experts.sums, seen.experts.counts
    if not len(sums):
        return {_SUMS: torch.zeros(1, dtype=torch.int64), _COUNTS: torch.zeros(1, dtype=torch.int64)}
    most = WHOLE.limit * ExpertStatistics.UNIT
    if not bool((sums < WHOLE.limit).all()):
        raise ModelError(
            f"block {seen.block.index}: the outputs of an expert add up to "
            f"{float(sums.max()) * ExpertStatistics.UNIT:.3g}: expected less than {most:.3g}, which sums "
            "over participants can hold: use fewer windows"
        )
    return {_SUMS: sums.to(torch.int64), _COUNTS: counts}


def _check(ballot: Ballot, target: Target) -> None:  # noqa: ARG001
    sums, counts = ballot.update[_SUMS], ballot.update[_COUNTS]
    if not bool(((sums >= 0) & (counts >= 0)).all()):
        raise UpdateError("the sums and counts of a block's experts contain a negative number: expected >= 0")
    if bool(((counts == 0) & (sums > 0)).any()):
        raise UpdateError(
            "an expert that no token reached has a sum above 0: expected 0 for the sum of no tokens"
        )
    if not n_experts(ballot.linears) and bool((counts > 0).any()):
        raise UpdateError("tokens reached experts in a block that has none: expected a count of 0")


def _figures(update: Mapping[str, Tensor], linears: Linears, n_tokens: int) -> Tensors:  # noqa: ARG001
    """The sum over all experts, and the largest count, for each token of the text."""
    sums, counts = (update[name].cpu().to(torch.float64) / n_tokens for name in (_SUMS, _COUNTS))
    return {_SUMS: sums.sum().reshape(1) * ExpertStatistics.UNIT, _COUNTS: counts.max().reshape(1)}


def _outstanding(figures: Mapping[str, Tensors], norms: Norms) -> dict[str, str]:  # noqa: ARG001
    refused = {
        name: f"{float(figure[_COUNTS]):.4g} tokens reached an expert for each token of the text: expected "
        "at most 1"
        for name, figure in figures.items()
        if float(figure[_COUNTS]) > 1
    }
    if len(figures) < FEWEST:
        return refused
    ratios, _ = ratios_to_others(torch.stack([figure[_SUMS] for figure in figures.values()]))
    for name, ratio in zip(figures, ratios.tolist(), strict=True):
        if ratio > FACTOR:
            refused.setdefault(
                name,
                f"what the experts add to a token is {ratio:.4g} times the other participants' median: "
                f"expected at most {FACTOR:g} times",
            )
    return refused


def _zeros(linears: Linears, device: torch.device) -> Totals:  # noqa: ARG001  added up on the CPU
    n = n_values(linears)
    return Totals(ExactSums({name: FixedPointSum.zeros(WHOLE, n) for name in (_SUMS, _COUNTS)}))


def expert_scores(totals: Totals, linears: Linears) -> list[float]:
    """Mean of what each expert adds to its tokens, over all participants; 0 for one that none reached.

    Source: Lasby et al., REAP the Experts (arXiv 2510.13999).
    """
    sums, counts = totals.sums[_SUMS], totals.sums[_COUNTS]
    means = sums * ExpertStatistics.UNIT / counts.clamp_min(1)
    scores: list[float] = means.tolist()
    return scores[: n_experts(linears)]


def scores_on_grid(scores: Sequence[float]) -> Tensor:
    """Scores as whole numbers, int64; a single zero if the block has no experts."""
    whole = torch.tensor(scores or [0.0], dtype=torch.float64) / ExpertStatistics.UNIT
    return torch.round(whole).to(torch.int64)


EXPERTS = Sharing(
    kind="experts",
    noun="what each expert adds to its tokens",
    content="For each expert of a block, the number of tokens that reach it, and the sum over these of the "
    "router's weight times the norm of the expert's output.",
    wire=Wire(11, COUNTS, COUNTS, not_negative="sums and counts", grid=WHOLE),
    shapes=_shapes,
    contribute=_contribute,
    check=_check,
    zeros=_zeros,
    comparison=Comparison(_figures, _outstanding),
    observes=lambda linears: {},  # noqa: ARG005
    watches_experts=True,
)
