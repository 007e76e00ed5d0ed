"""What the report answers first: sentences computed from the record, none of them false."""

from __future__ import annotations

import json
import re
import struct

import pytest

from fedprllm.packing.archive import pack
from fedprllm.report.layout import Table
from fedprllm.report.stored import stored
from fedprllm.report.words import listed, percent_range, perplexity
from tests.report_pages import (
    measured,
    report,
    result_of,
)

THIN = "\N{NO-BREAK SPACE}"
LOWER = "lower than that of the model made alone"
HIGHER = "higher than that of the model made alone"


@pytest.fixture
def comparing(run_once, edited):
    """``comparing(**models)``: the page of a run that is compared with other models, on texts by site."""

    def get(**models):
        names = {"dense": "dense", "together": "federated", "pooled": "centralized"}
        texts = ("site-0", "site-1", "site-2")

        def compare(result):
            result["comparison"] = {
                names.get(model, f"local-only: {model.replace('_', '-')}"): measured(
                    **dict(zip(texts, values, strict=False))
                )
                for model, values in models.items()
            }

        return report(edited(run_once(), compare))

    return get


# Did it pay off ---------------------------------------------------------------------------------


def test_whom_pruning_together_paid_off_for(comparing):
    """On own text 0.9, 1.1 and 1.005 of alone; on the others' 0.5, for site-1 1."""
    page = comparing(
        dense=(10, 10, 10),
        together=(18.0, 22.0, 20.1),
        site_0=(20.0, 44.0, 40.2),
        site_1=(18.0, 20.0, 20.1),
        site_2=(36.0, 44.0, 20.0),
        pooled=(18.0, 22.0, 20.1),
    )
    assert page.verdicts[0] == (
        "Pruning together gave a better model than pruning alone for 1 of 3 participants on their own text, "
        "and for 2 of 3 participants on the others' text."
    )
    assert page.verdicts[0] in page.text.split("zeros 50.0 %")[0], "the head says it too"
    assert f"For site-0, the perplexity on their own text is 10.0 % {LOWER}." in page.text
    assert f"For site-1, the perplexity on their own text is 10.0 % {HIGHER}." in page.text
    assert "For site-2, the perplexity on their own text is the same within 1.0 %." in page.text
    assert f"For site-0 and site-2, the perplexity on the others' text is 50.0 % {LOWER}." in page.text
    assert "For site-1, the perplexity on the others' text is the same within 1.0 %." in page.text
    assert "With all text in one place, the perplexity would be the same within 1.0 %." in page.text
    assert "was not measured" not in page.text
    assert page.tables["Perplexity by text"][1] == [
        "site-0",
        "10.00",
        "18.00 +80.0 %",
        "20.00 +100.0 %",
        "18.00 to 36.00",
        "18.00 +80.0 %",
    ]


@pytest.mark.parametrize(
    ("together", "words"),
    [((18.0, 18.0, 18.0), "for all 3 participants"), ((22.0, 22.0, 22.0), "for none of 3 participants")],
)
def test_all_or_none(comparing, together, words):
    alone = (20.0, 20.0, 20.0)
    page = comparing(dense=(10, 10, 10), together=together, site_0=alone, site_1=alone, site_2=alone)
    assert page.verdicts[0] == (
        f"Pruning together gave a better model than pruning alone {words} on their own text, "
        f"and {words} on the others' text."
    )


def test_models_made_alone_are_compared_on_texts_of_nobody_too(run_once, edited):
    def compare(result):
        result["comparison"] = {
            "dense": measured(notes=10.0),
            "federated": measured(notes=12.0),
            "local-only: site-0": measured(notes=15.0),
            "local-only: site-1": measured(notes=11.0),
        }

    page = report(edited(run_once(), compare))
    assert page.verdicts[0].endswith("for 1 of 2 participants on average over the texts.")
    assert "was not measured" not in page.text


def test_a_model_that_is_unusable_is_no_gain_and_one_made_alone_is_no_match(comparing):
    infinite = float("inf")
    page = comparing(
        dense=(10, 10, 10),
        together=(infinite, 20.0, infinite),
        site_0=(20.0, 20.0, 20.0),
        site_1=(20.0, infinite, 20.0),
        site_2=(20.0, 20.0, infinite),
    )
    assert page.verdicts[0] == (
        "Pruning together gave a better model than pruning alone for 1 of 3 participants on their own text, "
        "and for none of 3 participants on the others' text."
    )
    assert (
        "For site-0, the perplexity on their own text is ∞ times that of the model made alone." in page.text
    )
    assert "For site-2, the perplexity on their own text is the same within 1.0 %." in page.text
    assert "The pruned model is unusable on site-0 and site-2" in page.text


def test_without_the_dense_model_nothing_is_said_about_the_cost(run_once, edited):
    def compare(result):
        result["comparison"] = {"federated": measured(notes=12.0)}

    page = report(edited(run_once(), compare))
    assert page.tables["Perplexity by text"][1] == ["notes", "", "12.00"]
    assert len(page.verdicts) == 1, "that about bytes"


def evaluated(dense, pruned):
    def evaluate(result):
        result["evaluation"] = {"dense": measured(**dense), "model": measured(**pruned)}

    return evaluate


@pytest.mark.parametrize(
    ("dense", "pruned", "said"),
    [
        ({"a": 10.0}, {"a": 12.0}, "Pruning raised the perplexity on a from 10.00 to 12.00 (+20.0 %)."),
        ({"a": 10.0}, {"a": 9.0}, "Pruning lowered the perplexity on a from 10.00 to 9.00 (-10.0 %)."),
        (
            {"a": 10.0, "b": 10.0},
            {"a": 12.0, "b": 11.0},
            "Pruning raised the perplexity on all 2 texts, by 10.0 % (b) to 20.0 % (a); geometric mean",
        ),
        (
            {"a": 10.0, "b": 10.0},
            {"a": 8.0, "b": 9.0},
            "Pruning lowered the perplexity on all 2 texts, by 10.0 % (b) to 20.0 % (a); geometric mean",
        ),
        (
            {"a": 10.0, "b": 10.0},
            {"a": 9.0, "b": 11.0},
            "Pruning changed the perplexity by -10.0 % (a) to +10.0 % (b); geometric mean",
        ),
        (
            {"a": 10.0, "b": 10.0},
            {"a": 30.0, "b": 1e9},
            "Pruning multiplied the perplexity on all 2 texts by 3.0 (a) to 1.0e08 (b); geometric mean",
        ),
        ({"a": 10.0, "b": 10.0}, {"a": 11.0, "b": float("inf")}, "The pruned model is unusable on b:"),
    ],
)
def test_what_pruning_cost_is_said_as_it_is(run_once, edited, dense, pruned, said):
    page = report(edited(run_once(), evaluated(dense, pruned)))
    assert page.verdicts[0].startswith(said)
    assert "Whether a participant could have made as good a model alone was not measured" in page.text


def test_models_of_participants_that_pruned_alone(run_once, edited):
    def evaluate(result):
        names = list(result["models"])
        result["evaluation"] = {"dense": measured(**dict.fromkeys(names, 10.0))} | {
            name: measured(**{other: 12.0 if other == name else 15.0 for other in names}) for name in names
        }

    page = report(edited(run_once(strategy="local-only"), evaluate))
    assert page.verdicts[0] == (
        "Pruned alone, the participants' models have perplexities 20.0 % higher than the dense model's on "
        "own text, and 50.0 % higher than the dense model's on the others'."
    )
    folders = page.tables["Folders of the models"]
    assert folders[1] == ["site-0", "edited/participants/site-0/model"]


# What left each participant ---------------------------------------------------------------------


def federated(result):
    result["run_id"] = "ab" * 16
    for one in result["participants"].values():
        one["sources"] = ["kept by the participant"]
        del one["fingerprint"]


def test_who_sees_what_in_a_federation(run_once, edited):
    page = report(edited(run_once(), federated))
    assert "What left each participant" in page.headings
    assert page.verdicts[-1].startswith("Each participant sent ")
    assert page.left["seen by the server"] == "every participant's updates, one by one"
    assert "kept by the participant" not in page.text
    assert "nothing left the machine" not in page.text
    assert "--held-out" in page.text


def test_under_masks_the_server_sees_sums(run_once):
    page = report(run_once(3, secure=True))
    assert page.left["seen by the server"] == "only sums, added up under masks, over at least 3 participants"
    assert "The server sees only sums over participants." in page.verdicts[-1]
    assert "one by one" not in page.text
    assert "in the sum only" in page.left["with each update"]


def test_participants_that_did_not_report_and_that_left_are_named(run_once, edited):
    def change(result):
        federated(result)
        result["evaluation"] = {
            "dense": measured(**{"site-0": 10.0, "site-1": 10.0}),
            "model": measured(**{"site-0": 11.0, "site-1": 12.0}),
        }
        result["participants"]["site-2"]["n_blocks"] = 1
        result["config"]["block_fraction"] = "site-9=0.5"

    run = edited(run_once(), change)
    (run / "federation").mkdir()
    lines = [
        {"participant": "site-2", "event": "left out", "reason": "deadline: block 1 was not ready in time"},
        {"participant": "site-9", "event": "left out", "reason": "absent: <b>"},
        {"participant": "site-1", "event": "left out", "reason": "busy"},
        {"participant": "site-0", "event": "update of block 1 refused", "reason": "NaN"},
    ]
    events = "\n".join([*map(json.dumps, lines), '{"participant": "si', "7"])
    (run / "federation" / "events.jsonl").write_text(events)
    page = report(run)
    assert "Not reported by site-2: a participant measures only if" in page.text
    assert "the own text of the 2 participants that measured it" in page.verdicts[0]
    assert (
        "site-2 was left out (deadline: block 1 was not ready in time); its updates of 1 of 3 blocks"
        in page.text
    )
    assert "site-9 was left out (absent: <b>); nothing of it is in the model." in page.text
    assert "site-1 was left out (busy); its updates of all blocks count." in page.text
    assert "<b>" not in page.html
    assert "site-0 was left out" not in page.text


def test_few_tokens_and_many_ties_are_cautions(run_once, edited):
    def change(result):
        evaluated({"a": 10.0}, {"a": 12.0})(result)
        for record in result["blocks"]:
            for linear in record["linears"].values():
                linear["n_ties"] = linear["n_pruned"] // 2

    page = report(edited(run_once(), change))
    assert "The perplexity on a was measured on 4,321 tokens" in page.text
    assert "of the prunes were decided by the rule for ties (index), not by the participants." in page.text


# What you got -----------------------------------------------------------------------------------


def test_the_folder_and_its_size(run_once):
    run = run_once()
    page, record = report(run), result_of(run)
    assert f'from_pretrained("{run.name}/model")' in page.text
    files = list((run / "model").glob("*.safetensors"))
    shown = f"{sum(path.stat().st_size for path in files) / 1000:.1f} kB"
    sizes = {row[0]: row[1:] for row in page.tables["Size and speed"]}
    assert sizes["weight files"] == [shown, f"{shown} as large"]
    n_zeros = sum(one["n_zeros"] for block in record["blocks"] for one in block["linears"].values())
    assert sizes[f"zeros among {record['n_prunable']:,} prunable weights"][1] == f"{n_zeros:,} 50.0 %"
    assert sizes["packed with fedprllm pack"][1].startswith("at most ")
    assert sizes["speed in ordinary software"][1] == "as fast"


def test_a_packed_model_is_as_small_as_said(run_once, tmp_path):
    """The bound is that of the weights; side files come on top."""
    run = run_once()
    n_zeros = sum(one["n_zeros"] for b in result_of(run)["blocks"] for one in b["linears"].values())
    found = stored(run / "model", n_zeros)
    assert found is not None
    assert found.packed is None
    packed = pack(run / "model", tmp_path / "model.fedpack")
    weights = sum(path.stat().st_size for path in (run / "model").glob("*.safetensors"))
    assert found.packed_at_most < weights
    side = sum(p.stat().st_size for p in (run / "model").iterdir() if p.suffix != ".safetensors")
    assert (tmp_path / "model.fedpack").stat().st_size < found.packed_at_most + side, packed
    (tmp_path / "model").symlink_to(run / "model")
    again = stored(tmp_path / "model", n_zeros)
    assert again is not None
    assert again.packed == (tmp_path / "model.fedpack").stat().st_size


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{}"]
)
def test_files_that_are_no_weights_have_no_size(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert stored(tmp_path, 0) is None


def test_a_model_elsewhere_has_no_size(run_once, edited):
    page = report(edited(run_once(), lambda result: None))
    assert "weight files" not in [row[0] for row in page.tables["Size and speed"]]


# Words ------------------------------------------------------------------------------------------


def test_numbers_in_words():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed([str(number) for number in range(9)]) == "0, 1, 2, 3, 4, 5 and 3 more"
    assert percent_range([0.1, 0.2]) == f"10.0 to 20.0{THIN}%"
    assert percent_range([0.1, 0.1]) == f"10.0{THIN}%"
    assert [perplexity(value) for value in (9.5, 99_999.0, 1e120, float("inf"))] == [
        "9.50",
        "99,999.00",
        "1.0e120",
        "∞",
    ]


def test_a_narrow_page_stacks_tables_that_do_not_fit():
    few = Table("", ("text", "dense", "pruned"), "lrr", [["prose", "10.43", "13.99"]])
    many = Table("", ["text", *map(str, range(12))], "l" + "r" * 12, [["prose", *["10.43"] * 12]])
    long = Table("", ("", ""), "ll", [["x" * 60, "1"]])
    assert [table.stacked for table in (few, many, long)] == [False, True, True]


def test_names_cannot_become_markup_anywhere(run_once, edited):
    """In sentences as in tables: the verdict, the list of cautions, commands and folders."""
    hostile = "<i>x</i>&\"'{}{{7*7}}%s"

    def change(result):
        federated(result)
        result["participants"][hostile] = result["participants"].pop("site-0")
        for record in result["blocks"]:
            record["participants"][0] = hostile
            record["participant_ties"][hostile] = record["participant_ties"].pop("site-0")
        result["comparison"] = {
            "dense": measured(**{hostile: 10.0}),
            "federated": measured(**{hostile: 12.0}),
            f"local-only: {hostile}": measured(**{hostile: 15.0}),
        }
        result["notes"] = [f"{hostile} has too little text"]
        result["models"] = {"model": f"model-{hostile}"}

    page = report(edited(run_once(), change))
    assert "<i>" not in page.html
    assert page.text.count(hostile) >= 6
    assert not re.search(r"(?<!\{)49", page.verdicts[0])
