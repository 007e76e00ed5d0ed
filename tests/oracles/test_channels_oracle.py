"""Check the removal of channels against a slow greedy search with explicit inverses."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedprllm.core.groups import Grouping
from fedprllm.core.solvers import channels
from fedprllm.core.solvers.channels import kept_channels, next_width, remove_channels, remove_units
from fedprllm.core.solvers.scaled import Problem
from tests.oracles.test_sparsegpt_oracle import problem

DAMPING = 0.1


def scaled(weight, gram, damping=DAMPING) -> Problem:
    return Problem.of(weight, gram, Grouping("layer", 0.0), damping, "index", ())


def best(weight, hessian, left):
    """The columns with which the remaining channels do best: one system of equations for each row."""
    return torch.stack([torch.linalg.solve(hessian[left][:, left], (row @ hessian)[left]) for row in weight])


def slow_removal(weight, gram, n_removed, at_once):
    """Greedy optimal brain surgeon: invert what is left, remove the cheapest, refit, from the start again."""
    hessian = gram + DAMPING * gram.diagonal().diag()
    left = list(range(len(gram)))
    while n_removed:
        inverse = torch.linalg.inv(hessian[left][:, left])
        columns = best(weight, hessian, left)
        costs = [
            sum(float(w) ** 2 for w in columns[:, place]) / float(inverse[place, place])
            for place in range(len(left))
        ]
        n = min(at_once, n_removed)
        gone = sorted(range(len(left)), key=lambda place: costs[place])[:n]
        left = [channel for place, channel in enumerate(left) if place not in gone]
        n_removed -= n
    return left, best(weight, hessian, left)


@pytest.mark.parametrize("at_once", [1, 3, 16])
@pytest.mark.parametrize("n_removed", [1, 5, 17, 39])
def test_agrees_with_a_slow_search(monkeypatch, at_once, n_removed):
    monkeypatch.setattr(channels, "_AT_ONCE", at_once)
    weight, inputs = problem(12, 40, 300)
    gram = inputs.T @ inputs
    found = remove_channels(scaled(weight, gram), n_removed)
    left, columns = slow_removal(weight, gram, n_removed, at_once)
    assert (~found.removed).nonzero().flatten().tolist() == left
    torch.testing.assert_close(found.weight, columns, rtol=1e-6, atol=1e-8)


def slow_units(weight, gram, units, groups, n_removed):
    """Greedy removal of whole units, one of each group at a time, each trial refitted from the start."""
    hessian = gram + DAMPING * gram.diagonal().diag()
    left = list(range(len(gram)))

    def loss(channels):
        error = weight.clone()
        error[:, channels] -= best(weight, hessian, channels)
        return float((error @ hessian * error).sum())

    n_groups = max(groups) + 1
    for _ in range(n_removed // n_groups):
        gone = []
        for group in range(n_groups):
            trials = {
                unit: loss([channel for channel in left if units[channel] != unit])
                for unit in {units[channel] for channel in left}
                if groups[unit] == group
            }
            gone.append(min(trials, key=lambda unit: trials[unit]))
        left = [channel for channel in left if units[channel] not in gone]
    return left, best(weight, hessian, left)


@pytest.mark.parametrize(
    ("groups", "n_removed"),
    [([0] * 8, 1), ([0] * 8, 7), ([0, 0, 0, 0, 1, 1, 1, 1], 4), ([0, 1] * 4, 6)],
)
def test_whole_units_agree_with_trying_every_one(groups, n_removed):
    weight, inputs = problem(12, 40, 300)
    gram = inputs.T @ inputs
    units = torch.arange(40) // 5
    found = remove_units(scaled(weight, gram), units, torch.tensor(groups), n_removed)
    left, columns = slow_units(weight, gram, units.tolist(), groups, n_removed)
    assert (~found.removed).nonzero().flatten().tolist() == left
    torch.testing.assert_close(found.weight, columns, rtol=1e-6, atol=1e-8)


def test_channels_that_never_speak_go_first_and_those_that_stay_keep_their_weights():
    weight, inputs = problem(12, 40, 300)
    silent = [3, 11, 30]
    inputs[:, silent] = 0
    gram = inputs.T @ inputs
    found = remove_channels(scaled(weight, gram), 2)
    assert found.removed.nonzero().flatten().tolist() == silent[:2]
    assert found.n_dead == 3
    assert torch.equal(found.weight[:, 28], weight[:, 30])
    # Nothing was lost, so nothing needs to be made up for.
    others = [channel for channel in range(40) if channel not in silent]
    kept = [channel for channel in range(40) if channel not in silent[:2]]
    torch.testing.assert_close(
        found.weight[:, [kept.index(channel) for channel in others]], weight[:, others]
    )


def test_a_channel_that_repeats_another_is_made_up_for():
    weight, inputs = problem(12, 40, 3000)
    inputs[:, 7] = 2 * inputs[:, 21]
    gram = inputs.T @ inputs
    found = remove_channels(scaled(weight, gram, damping=1e-6), 1)
    (gone,) = found.removed.nonzero().flatten().tolist()
    assert gone in (7, 21)
    kept = (~found.removed).nonzero().flatten()
    torch.testing.assert_close(inputs[:, kept] @ found.weight.T, inputs @ weight.T, rtol=1e-4, atol=1e-3)


@given(st.integers(1, 20_000), st.fractions(0, 1).filter(lambda f: f < 1))
def test_widths_are_rounded_to_what_hardware_likes(width, fraction):
    kept = kept_channels(width, fraction)
    multiple = width - next_width(width)
    assert 0 < kept <= width
    assert kept % multiple == width % multiple == 0
    assert multiple in (1, 2, 4, 8, 16, 32)
    assert abs(kept - (1 - fraction) * width) <= Fraction(multiple, 2) or kept == multiple
    assert kept_channels(width, Fraction(0)) == width


def test_widths_of_known_models():
    assert kept_channels(1536, Fraction("0.27")) == 1120
    assert kept_channels(11008, Fraction("0.2")) == 8800
    assert kept_channels(48, Fraction("0.3")) == 34
    assert kept_channels(172, Fraction("0.25")) == 128
