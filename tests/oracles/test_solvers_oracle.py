"""Check ADMM and ALPS against slow versions, row by row in float64, and properties that they must have."""

from __future__ import annotations

import pytest
import torch

from fedprllm.core.groups import Grouping
from fedprllm.core.masks import prune_lowest
from fedprllm.core.solvers import admm as admm_module
from fedprllm.core.solvers.admm import admm
from fedprllm.core.solvers.alps import alps
from fedprllm.core.solvers.scaled import Problem, damping_for
from fedprllm.core.solvers.sparsegpt import sparsegpt
from fedprllm.errors import ModelError
from tests.oracles.test_sparsegpt_oracle import problem

SOLVERS = {"admm": admm, "alps": alps}
PATTERNS = [(0.5, None), (0.3, None), (0.77, None), (0.5, (2, 4)), (0.25, (3, 4)), (2 / 3, (1, 3))]


def scaled(weight, gram, sparsity=0.5, n_m=None, damping=0.05, ties="index") -> Problem:
    return Problem.of(weight, gram, Grouping("layer", sparsity, n_m), damping, ties, (0, "server", "w"))


def lowest(values, fraction, n_m):
    """Places of the lowest magnitudes: over the whole matrix, or in every group of M."""
    places = [(o, j) for o in range(len(values)) for j in range(len(values[0]))]
    if n_m is None:
        ranked = sorted(places, key=lambda p: abs(float(values[p])))
        return set(ranked[: int(len(places) * fraction + 1e-9)])
    n, m = n_m
    chosen = set()
    for first in range(0, len(places), m):
        ranked = sorted(places[first : first + m], key=lambda p: abs(float(values[p])))
        chosen |= set(ranked[: int((m - n) * fraction)])
    return chosen


def masked(values, places):
    values = values.clone()
    for place in places:
        values[place] = 0.0
    return values


def refit_exactly(hessian, target, places):
    """Each row's best weights: one small system of equations per row."""
    solution = torch.zeros_like(target)
    for o in range(len(target)):
        kept = [j for j in range(len(hessian)) if (o, j) not in places]
        if kept:
            solution[o, kept] = torch.linalg.solve(hessian[kept][:, kept], target[o, kept])
    return solution


def slow_problem(weight, gram, damping):
    norms = gram.diagonal().sqrt()
    hessian = gram / norms[:, None] / norms + damping * torch.eye(len(gram), dtype=torch.float64)
    return norms, hessian, weight * norms


def slow_admm(weight, gram, sparsity, n_m, damping=0.05):
    norms, hessian, start = slow_problem(weight, gram, damping)
    target, x, u = start @ hessian, start.clone(), torch.zeros_like(start)
    regular = hessian + torch.eye(len(gram), dtype=torch.float64)
    for step in range(1, 16):
        part = 1 - (1 - step / 15) ** 3
        v = x + u
        places = lowest(v, part * (sparsity if n_m is None else 1), n_m)
        z = masked(v, places)
        u = v - z
        for o in range(len(x)):
            x[o] = torch.linalg.solve(regular, target[o] + z[o] - u[o])
    return refit_exactly(hessian, target, places) / norms, places


@pytest.mark.parametrize(("sparsity", "n_m"), PATTERNS)
def test_admm_agrees_with_a_slow_version(sparsity, n_m, monkeypatch) -> None:
    # The slow version refits exactly; so do conjugate gradients, given as many steps as there are inputs.
    refit = Problem.refit
    monkeypatch.setattr(Problem, "refit", lambda self, start, mask: refit(self, start, mask, 60))
    weight, inputs = problem(6, 24, 200)
    gram = inputs.T @ inputs
    found = admm(scaled(weight, gram, sparsity, n_m))
    expected, places = slow_admm(weight, gram, sparsity, n_m)
    assert {tuple(place) for place in found.pruned.mask.nonzero().tolist()} == places
    torch.testing.assert_close(found.weight, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("sparsity", "n_m"), PATTERNS)
def test_kept_weights_are_almost_the_best_for_their_mask(solver, sparsity, n_m) -> None:
    weight, inputs = problem(16, 24, 400)
    gram = inputs.T @ inputs
    found = SOLVERS[solver](scaled(weight, gram, sparsity, n_m))
    norms, hessian, start = slow_problem(weight, gram, 0.05)
    places = {tuple(place) for place in found.pruned.mask.nonzero().tolist()}
    best = refit_exactly(hessian, start @ hessian, places)

    def loss(z):
        return float(((z - start) @ hessian * (z - start)).sum())

    assert (1 - 1e-9) * loss(best) <= loss(found.weight * norms) <= 1.02 * loss(best)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("sparsity", "n_m"), PATTERNS)
@pytest.mark.parametrize("shape", [(5, 12), (32, 48)])
def test_exactly_k_weights_are_zero(solver, sparsity, n_m, shape) -> None:
    weight, inputs = problem(*shape, 100, dtype=torch.float32)
    found = SOLVERS[solver](scaled(weight, inputs.T @ inputs, sparsity, n_m))
    mask = found.pruned.mask
    assert int(mask.sum()) == Grouping("layer", sparsity, n_m).n_pruned(shape) * (
        1 if n_m is None else mask.numel() // n_m[1]
    )
    if n_m is not None:
        assert (mask.reshape(-1, n_m[1]).sum(dim=1) == n_m[1] - n_m[0]).all()
    assert torch.equal(found.weight == 0, mask)
    assert not torch.signbit(found.weight[mask]).any(), "pruned weights are +0.0"


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_is_smaller_than_with_sparsegpt(solver) -> None:
    weight, inputs = problem(48, 64, 2000, dtype=torch.float32)
    gram = inputs.T @ inputs

    def error(found):
        return float((inputs @ (found.weight - weight).T).square().sum())

    assert error(SOLVERS[solver](scaled(weight, gram, 0.5))) < 0.95 * error(sparsegpt(weight, gram, 0.5))


@pytest.mark.parametrize("solver", SOLVERS)
def test_dead_channels_go_first_and_spared_weights_keep_their_value(solver) -> None:
    weight, inputs = problem(6, 24, dtype=torch.float32)
    inputs[:, [2, 3, 11]] = 0.0
    gram = inputs.T @ inputs
    found = SOLVERS[solver](scaled(weight, gram, 0.5))
    assert found.pruned.mask[:, [2, 3, 11]].all()
    assert found.n_dead == 3
    few = SOLVERS[solver](scaled(weight, gram, 0.1))  # 14 of the 18 dead weights
    assert int(few.pruned.mask.sum()) == 14
    assert torch.equal(
        few.weight[:, [2, 3, 11]], weight[:, [2, 3, 11]].masked_fill(few.pruned.mask[:, [2, 3, 11]], 0)
    )
    assert torch.isfinite(few.weight).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_with_all_inputs_zero_it_prunes_by_magnitude(solver) -> None:
    weight, _ = problem(4, 8, dtype=torch.float32)
    found = SOLVERS[solver](scaled(weight, torch.zeros(8, 8)))
    expected = prune_lowest(weight.abs(), weight, Grouping("layer", 0.5), "index")
    assert torch.equal(found.pruned.mask, expected.mask)
    assert torch.equal(found.weight, weight.masked_fill(expected.mask, 0.0))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_unit_of_the_inputs_makes_no_difference(solver, factor) -> None:
    weight, inputs = problem(8, 24, 200)
    gram = inputs.T @ inputs
    one, other = (SOLVERS[solver](scaled(weight, gram * scale)) for scale in (1.0, factor))
    assert torch.equal(one.pruned.mask, other.pruned.mask)
    torch.testing.assert_close(one.weight, other.weight)


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_to_prune_changes_nothing(solver) -> None:
    weight, inputs = problem(4, 8)
    found = SOLVERS[solver](scaled(weight, inputs.T @ inputs, 0.0))
    assert not found.pruned.mask.any()
    assert torch.equal(found.weight, weight)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_sums_that_are_none_are_refused(value) -> None:
    gram = torch.eye(8)
    gram[3, 3] = value
    with pytest.raises(ModelError, match="expected finite sums of squares"):
        scaled(torch.ones(4, 8), gram)


def test_damping_grows_where_tokens_are_few() -> None:
    assert damping_for(16 * 576, 576) == damping_for(10**9, 576) == 0.1
    assert damping_for(8 * 576, 576) == 0.2
    assert damping_for(1, 576) == damping_for(0, 576) == 1.0


def test_more_iterations_of_admm_never_hurt_much() -> None:
    weight, inputs = problem(32, 48, 500, dtype=torch.float32)
    found = [scaled(weight, inputs.T @ inputs, 0.6) for _ in range(2)]

    def error(result):
        return float((inputs @ (result.weight - weight).T).square().sum())

    assert error(admm(found[0], 60)) < 1.05 * error(admm(found[1], admm_module._ITERATIONS))
