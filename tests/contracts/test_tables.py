"""The tables match the option values that a user writes, and every entry is complete."""

from __future__ import annotations

from typing import get_args

import pytest

from fedprllm.config import CriterionName, PruneConfig, ShareName
from fedprllm.core.criteria import CRITERIA
from fedprllm.core.ties import TIES
from fedprllm.deciding import DECISIONS, decision_of
from fedprllm.federation.plan import KINDS
from fedprllm.federation.protocol.update import GRADIENTS
from fedprllm.pruning.method import pruning_method, survey_method
from fedprllm.pruning.strategies import STRATEGIES
from fedprllm.settings import choices_of
from fedprllm.sharing import SHARING
from tests.models import STRUCTURES


def test_every_option_value_has_a_row_and_every_row_an_option_value():
    assert set(get_args(CriterionName)) == set(CRITERIA)
    assert set(get_args(ShareName)) == set(DECISIONS)
    assert set(KINDS) == {*SHARING, GRADIENTS}
    aggregations = {row.aggregation for rows in DECISIONS.values() for row in rows}
    assert set(choices_of(PruneConfig.model_fields["aggregation"].annotation)) == aggregations
    assert set(choices_of(PruneConfig.model_fields["strategy"].annotation)) == set(STRATEGIES)
    assert set(choices_of(PruneConfig.model_fields["ties"].annotation)) == set(TIES)


def test_solvers_are_what_decides_about_gram_matrices():
    names = choices_of(PruneConfig.model_fields["solver"].annotation)
    assert set(names) - {None} == {decision.name for decision in DECISIONS["gram"]}
    for decision in DECISIONS["gram"]:
        assert decision_of(PruneConfig(share="gram", solver=decision.name)) is decision
    assert decision_of(PruneConfig(share="gram")) is DECISIONS["gram"][0]


def test_rows_go_by_their_own_names():
    assert all(row.kind == kind for kind, row in SHARING.items())
    for decisions in DECISIONS.values():
        names = [decision.name for decision in decisions]
        assert len(names) == len(set(names))
        assert decisions[0].aggregation == "sum"


def test_no_two_kinds_share_a_number_on_the_wire():
    codes = [row.wire.code for row in SHARING.values()]
    assert len(codes) == len(set(codes))
    # Assigned numbers are part of the format and never change: ledgers contain messages written with them.
    assert {kind: row.wire.code for kind, row in SHARING.items()} == {
        "mask": 1,
        "statistics": 2,
        "gram": 3,
        "weights": 4,
        "outliers": 5,
        "channels": 7,
        "heads": 8,
        "parts": 9,
        "influence": 10,
        "experts": 11,
    }


@pytest.mark.parametrize("share", DECISIONS)
@pytest.mark.parametrize("allocation", ["uniform", "owl"])
def test_a_participant_is_asked_for_the_kinds_that_a_run_uses(share, allocation):
    if share in STRUCTURES:
        allocation = "uniform"  # OWL allocates zeros only
    config = PruneConfig(share=share, allocation=allocation, **STRUCTURES.get(share, {}))
    used = {pruning_method(config).sharing.kind}
    if allocation == "owl":
        used.add(survey_method(config).sharing.kind)
    assert set(config.kinds) == used
