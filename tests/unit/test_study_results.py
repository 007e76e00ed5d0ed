"""Means, spreads and paired comparisons, on hand-made numbers."""

from __future__ import annotations

import json
import math

import pytest

from fedprllm import PruneConfig, RunError
from fedprllm.evaluation.results import Perplexity
from fedprllm.study.domains import own_and_others
from fedprllm.study.questions import Cell
from fedprllm.study.records import CellRecord
from fedprllm.study.results import (
    Spread,
    closed_gap,
    how_made,
    name_of,
    names_of_settings,
    paired,
    spread_by_text,
)


def row(text: str, perplexity: float) -> Perplexity:
    return Perplexity(text=text, perplexity=perplexity, nll=math.log(perplexity), n_tokens=10, n_windows=1)


def measured(
    models: dict[str, dict[str, float]], partition: str = "iid", **options
) -> tuple[Cell, CellRecord]:
    cell = Cell(PruneConfig(**options), 2, partition)
    record = CellRecord(
        setting=cell.setting,
        seed=cell.config.seed,
        made="derived",
        n_participants=2,
        participants=["a", "b"],
        n_tokens=64,
        update_bytes=2,
        update_bytes_per_block=1,
        models={name: [row(text, value) for text, value in texts.items()] for name, texts in models.items()},
        n_prunable=8,
        n_zeros=5,
        n_pruned=4,
        n_ties=1,
    )
    return cell, record


def test_a_record_keeps_its_keys_on_disk_and_an_infinite_perplexity(tmp_path):
    _, record = measured({"model": {"t": 10.0}})
    collapsed = Perplexity(text="t", perplexity=math.inf, nll=800.0, n_tokens=10, n_windows=1)
    record = record.model_copy(update={"models": {"model": [collapsed]}, "agreement": None, "seconds": 1.5})
    (tmp_path / "cell.json").write_text(json.dumps(record.as_json()))
    stored = json.loads((tmp_path / "cell.json").read_text())
    assert stored["models"]["model"][0]["perplexity"] == "inf"
    assert stored["agreement"] is None
    assert "pruned_by_votes" not in stored
    assert CellRecord.read(tmp_path / "cell.json") == record


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "cell.json").write_text('{"setting": {}}')
    with pytest.raises(RunError, match=r"cell\.json is not a valid record \(seed: Field required\)"):
        CellRecord.read(tmp_path / "cell.json")


def test_models_made_alone_count_as_their_mean_and_seeds_spread():
    cells = [
        measured({"a": {"t": 10.0}, "b": {"t": 14.0}}, strategy="local-only", seed=0),
        measured({"a": {"t": 20.0}, "b": {"t": 16.0}}, strategy="local-only", seed=1),
        measured({"model": {"t": 9.0}}, seed=0),
    ]
    found = spread_by_text(cells)
    assert found["local-only"]["t"].values == (12.0, 18.0)
    assert found["local-only"]["t"].sd == pytest.approx(math.sqrt(18))
    assert str(found["local-only"]["t"]) == "15.00 ± 4.24"
    assert str(found["one-shot"]["t"]) == "9.00"


def test_pairs_are_equal_in_everything_else():
    cells = [
        measured({"model": {"t": 10.0, "u": 10.0}}, scale_weights=False, seed=0),
        measured({"model": {"t": 20.0, "u": 5.0}}, scale_weights=True, seed=0),
        measured({"model": {"t": 10.0}}, scale_weights=True, seed=1),  # no partner
        measured({"model": {"t": 10.0}}, scale_weights=True, sparsity=0.2),  # none either
    ]
    difference = paired(cells, "scale_weights", False, True)
    assert difference.values == pytest.approx((math.log(2), -math.log(2)))
    assert "worse in 1 of 2 pairs" in str(difference)
    assert paired(cells, "strategy", "one-shot", "iterative") is None


def test_the_tie_rule_that_is_not_named_is_the_participants():
    cells = [
        measured({"model": {"t": 10.0}}),
        measured({"model": {"t": 20.0}}, server_ties="magnitude"),
    ]
    assert paired(cells, "server_ties", "index", "magnitude").values == pytest.approx((math.log(2),))


def test_the_gap_that_one_shot_closes():
    cells = [
        measured({"a": {"t": math.exp(3.0)}}, strategy="local-only"),
        measured({"model": {"t": math.exp(2.25)}}),
        measured({"model": {"t": math.exp(2.0)}}, strategy="centralized"),
    ]
    assert closed_gap(cells) == pytest.approx(0.75)
    assert closed_gap(cells[:2]) is None


def test_own_text_and_the_others():
    alone = {"x": {"x": 10.0, "y": 40.0}, "y": {"x": 30.0, "y": 20.0}}
    cells = [
        measured(alone, "domain", strategy="local-only"),
        measured({"model": {"x": 12.0, "y": 24.0}}, "domain"),
    ]
    found = own_and_others(cells)
    assert (found["local-only"][0].mean, found["local-only"][1].mean) == (15.0, 35.0)
    assert (found["one-shot"][0].mean, found["one-shot"][1].mean) == (18.0, 18.0)


def test_settings_are_named_by_what_varies():
    cells = [
        Cell(PruneConfig(sparsity=s, server_group=g), 2, "iid") for s in (0.3, 0.5) for g in ("row", "layer")
    ]
    assert name_of(cells[0], cells) == "30%, server row"
    assert name_of(cells[0], cells[:2]) == "server row"
    assert name_of(cells[0], cells[:1]) == "one-shot"


def test_settings_that_differ_little_are_not_averaged():
    cells = [measured({"model": {"t": 10.0 + n}}, sparsity=s) for n, s in enumerate((0.5, 0.501, 0.5000001))]
    found = spread_by_text(cells)
    assert {name: row["t"].values for name, row in found.items()} == {
        "50%": (10.0,),
        "50.1%": (11.0,),
        "50.00001%": (12.0,),
    }
    assert set(how_made(cells).values()) == {"derived"}


def test_the_rule_for_equal_votes_is_that_of_the_participants_unless_named():
    options = [{"ties": "random"}, {"ties": "random", "server_ties": "index"}, {}]
    cells = [Cell(PruneConfig(**one), 2, "iid") for one in options]
    assert list(names_of_settings(cells).values()) == [
        "local ties random, ties random",
        "local ties random, ties index",
        "local ties index, ties index",
    ]


def test_a_model_named_like_a_text_is_not_its_owner():
    cells = [measured({"x": {"x": 10.0}, "y": {"x": 30.0}}, "dirichlet", strategy="local-only")]
    (own, _) = own_and_others(cells)["local-only"]
    assert own.mean == 20.0


def test_a_collapse_is_infinite_and_has_no_spread():
    assert str(Spread((math.inf, 5.0))) == "∞"
    assert Spread((math.inf, 5.0)).sd == 0.0


def with_windows(losses: dict[str, dict[str, list[float]]], partition: str = "iid", **options):
    """A cell with the losses of windows of 11 tokens, of which 10 are predicted."""
    sums = {name: {text: sum(each) for text, each in texts.items()} for name, texts in losses.items()}
    cell, record = measured(
        {name: {text: math.exp(total / 40) for text, total in texts.items()} for name, texts in sums.items()},
        partition,
        **options,
    )
    rows = {
        name: [each.model_copy(update={"n_tokens": 40, "n_windows": 4}) for each in of_model]
        for name, of_model in record.models.items()
    }
    return cell, record.model_copy(update={"models": rows, "window_losses": losses})


def test_the_interval_is_that_of_paired_windows():
    base = [10.0, 30.0, 20.0, 40.0]
    steady = [value + 1 for value in base]
    unsteady = [value + step for value, step in zip(base, (10, -10, 9, -8), strict=True)]
    for after, is_clear in ((steady, True), (unsteady, False)):
        cells = [with_windows({"model": {"t": base}}), with_windows({"model": {"t": after}}, sparsity=0.6)]
        difference = paired(cells, "sparsity", 0.5, 0.6)
        low, high = difference.interval
        assert low <= difference.values[0] <= high
        assert (low > 0 or high < 0) is is_clear
    cells = [with_windows({"model": {"t": base}}), with_windows({"model": {"t": steady}}, sparsity=0.6)]
    # Every window differs by 1 nat in 10 tokens, so that resampling finds nothing else.
    assert paired(cells, "sparsity", 0.5, 0.6).interval == pytest.approx((0.1, 0.1))
    assert "perplexity times 1.105, 95 % interval 1.105 to 1.105" in str(paired(cells, "sparsity", 0.5, 0.6))


def test_without_losses_of_windows_there_is_no_interval():
    cells = [with_windows({"model": {"t": [1.0] * 4}}), measured({"model": {"t": 2.0}}, sparsity=0.6)]
    difference = paired(cells, "sparsity", 0.5, 0.6)
    assert difference.interval is None
    assert "interval" not in str(difference)


def test_partitions_are_compared_although_they_have_different_numbers_of_participants():
    domain = measured({"model": {"t": 10.0}}, "domain")
    cell, record = measured({"model": {"t": 20.0}}, "public")
    public = Cell(cell.config, 1, "public"), record
    assert paired([domain, public], "partition", "public", "domain").values == pytest.approx((-math.log(2),))


def test_own_text_is_measured_with_the_model_made_from_it():
    alone = {"x": {"x": [10.0] * 4, "y": [40.0] * 4}, "y": {"x": [30.0] * 4, "y": [20.0] * 4}}
    cells = [
        with_windows(alone, "domain", strategy="local-only"),
        with_windows({"model": {"x": [12.0] * 4, "y": [24.0] * 4}}, "domain"),
    ]
    own = paired(cells, "strategy", "local-only", "one-shot", "own")
    others = paired(cells, "strategy", "local-only", "one-shot", "others")
    assert own.values == pytest.approx((0.2, 0.4))
    assert others.values == pytest.approx((-1.8, -1.6))
    assert own.interval == pytest.approx((0.3, 0.3))
