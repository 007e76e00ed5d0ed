"""Scoring and pruning a few rows at a time gives the same result as all rows at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fedprllm.core import threads
from fedprllm.core.criteria import CRITERIA
from fedprllm.core.groups import Grouping
from fedprllm.core.masks import count_close, prune_by_score, prune_lowest
from fedprllm.core.ties import TIES
from tests.isolation import torch_threads

GROUPINGS = [Grouping(group, 0.4) for group in ("row", "column", "layer")] + [Grouping("row", 0.5, (2, 4))]


@pytest.mark.parametrize("at_once", [1, 50, 97, 10**6])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_rows_at_a_time(monkeypatch, criterion, grouping, ties, at_once, dtype):
    monkeypatch.setattr(threads, "_AT_ONCE", at_once)
    with torch_threads(2):
        check(criterion, grouping, ties, dtype)


def check(criterion, grouping, ties, dtype):
    generator = torch.Generator().manual_seed(0)
    # Few distinct weights and a norm of one make many scores equal.
    weight = torch.randint(-4, 5, (23, 24), generator=generator).to(dtype)
    rule, norm = CRITERIA[criterion], torch.ones(24)
    norm[5] = 2.0

    def score(rows):
        return rule.score(rows, norm)

    scores = score(weight.float())
    expected = prune_lowest(scores, weight.float(), grouping, ties, (1, "w"))
    prune = partial(prune_by_score, score, weight, grouping, ties, (1, "w"), scores_rows=rule.scores_rows)
    found = prune(counts_close=True)
    assert torch.equal(found.mask, expected.mask)
    assert found.n_ties == expected.n_ties
    assert found.n_close == count_close(scores, expected.mask, grouping)
    assert prune().n_close is None
