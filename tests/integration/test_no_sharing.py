"""What nobody has to share, beside what participants share: in a study, and for one participant alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from fedprllm import ConfigError, DataError
from fedprllm.cli.app import app
from fedprllm.evaluation.perplexity import perplexities
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.study.data import StudyData
from fedprllm.study.questions import BY_DOMAIN, cells_of
from fedprllm.study.results import answers
from fedprllm.study.runner import study
from fedprllm.study.strangers import generated_windows, random_windows
from fedprllm.study.worth import _gain
from tests.integration.test_study import small, texts, worded  # noqa: F401  fixtures


@pytest.fixture
def asked(worded, texts):  # noqa: F811
    def get(**options):
        given = {
            "data": (),
            "eval": (),
            "domains": (texts["north"], texts["south"]),
            "public": (texts["pool"],),
            "questions": ("no-sharing",),
            "seeds": (0,),
        }
        return small(worded, texts, **(given | options))

    return get


def test_everyone_has_as_much_text_as_all_participants_together(asked, worded, tmp_path):  # noqa: F811
    config = asked()
    data = StudyData(BlockwiseModel(worded), config, tmp_path)
    cells = {cell.partition: cell for cell in cells_of(config) if cell.config.strategy == "one-shot"}
    assert set(cells) == set(BY_DOMAIN)
    found = {name: data.participants(cell) for name, cell in cells.items()}
    sizes = {name: {each.name: len(each.windows) for each in members} for name, members in found.items()}
    assert sizes == {
        "domain": {"north": 2, "south": 2},
        "public": {"public": 4},
        "generated": {"generated": 4},
        "random": {"random": 4},
        "with-public": {"north": 2, "south": 2, "public": 4},
    }
    public = {one.name: one for one in found["with-public"]}["public"]
    assert torch.equal(public.windows, found["public"][0].windows)
    for cell in cells.values():
        assert set(data.texts(cell)) == {"north", "south"}


def test_the_question_is_answered_for_every_way_to_prune(asked, tmp_path):
    results = study(asked(sparsity=(0.5, 0.6)), tmp_path / "study")
    cells = results.of("no-sharing")
    ways = {(cell.config.share, cell.config.pattern, cell.config.sparsity) for cell, _ in cells}
    assert ways == {
        ("mask", "unstructured", 0.5),
        ("mask", "unstructured", 0.6),
        ("gram", "unstructured", 0.5),
        ("gram", "unstructured", 0.6),
        ("gram", "6:8", 0.25),
        ("channels", "unstructured", 0.0),
    }
    for way in ways:
        these = [
            (cell, record)
            for cell, record in cells
            if (cell.config.share, cell.config.pattern, cell.config.sparsity) == way
        ]
        assert {(cell.partition, cell.config.strategy == "local-only") for cell, _ in these} == {
            *((name, False) for name in BY_DOMAIN),
            ("domain", True),
        }
        values = {
            cell.partition: [row.perplexity for row in record.models["model"]]
            for cell, record in these
            if cell.config.strategy != "local-only"
        }
        assert len(set(map(tuple, values.values()))) == len(BY_DOMAIN), "every text gives another model"
        (alone,) = (record for cell, record in these if cell.config.strategy == "local-only")
        assert set(alone.models) == {"north", "south"}
    sentences = answers(results, "no-sharing")
    assert all("95 % interval" in sentence for sentence in sentences)
    for where in ("mask, 50%", "mask, 60%", "gram, 50%", "gram, 60%", "gram, 6:8", "structure mlp=0.2"):
        mine = [each.removeprefix(f"At {where}: ") for each in sentences if each.startswith(f"At {where}: ")]
        # Beside the participants' text: public, generated and random text, public text added, and alone.
        together = "one-shot" if "mask" in where else "iterative"
        assert [each.partition(":")[0] for each in mine] == [
            *(f"domain versus {other}" for other in ("public", "generated", "random", "with-public")),
            f"on a participant's own text, {together} versus local-only",
            f"on the others' text, {together} versus local-only",
        ]
    page = (tmp_path / "study" / "report.html").read_text()
    assert "Is anyone&#39;s private text needed?" in page or "Is anyone's private text needed?" in page


def test_only_the_ways_that_were_named_are_compared(asked):
    cells = cells_of(asked(ways=("structure", "6:8")))
    assert {(cell.config.structure, cell.config.pattern) for cell in cells} == {
        ("mlp=0.2", "unstructured"),
        (None, "6:8"),
    }
    with pytest.raises(ConfigError, match="ways"):
        asked(ways=("magic",))
    few = cells_of(asked(ways=("mask",), against=("public",)))
    assert {(cell.partition, cell.config.strategy) for cell in few} == {
        ("domain", "one-shot"),
        ("domain", "local-only"),
        ("public", "one-shot"),
    }
    with pytest.raises(ConfigError, match="against"):
        asked(against=("domain",))


def test_without_public_text_the_question_is_not_asked_and_cannot_be(asked):
    assert "no-sharing" not in asked(public=(), questions=None).asked
    assert "no-sharing" in asked(questions=None).asked
    with pytest.raises(ConfigError, match="compares with public text, found none: name it with --public"):
        asked(public=())
    with pytest.raises(ConfigError, match="grid 1: partition with-public needs public text"):
        cells_of(asked(public=(), questions=(), grid=({"partition": ["with-public"]},)))


def test_too_little_public_text_is_refused_before_anything_is_computed(asked, tmp_path):
    (tmp_path / "public.txt").write_text("w1 w2 w3 " * 11)
    with pytest.raises(DataError, match=r"the public text has 2 windows of 16 tokens, expected 4"):
        study(asked(public=(str(tmp_path / "public.txt"),)), tmp_path / "study")


def test_generated_text_follows_the_model_and_its_seed(worded, tmp_path):  # noqa: F811
    model = BlockwiseModel(worded)
    one, again, other = (
        generated_windows(model, 20, 12, seed, tmp_path / name)
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert one.shape == (20, 12)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert (one[:, 0] == 1).all(), "each window begins with the beginning-of-sequence token"
    assert one.max() < 121, "nothing that the tokenizer does not know"
    assert len({tuple(row.tolist()) for row in one}) == 20
    kept = generated_windows(model, 20, 12, 5, tmp_path / "a")
    assert torch.equal(kept, one), "what was written once is kept"


def test_the_model_is_far_less_surprised_by_its_own_text_than_by_random_tokens(small_model, tmp_path):
    model = BlockwiseModel(small_model)
    written = list(generated_windows(model, 8, 64, 0, tmp_path / "own"))
    own, random = perplexities(model, {"own": written, "random": list(random_windows(model, 8, 64, 0))})
    assert own.nll < random.nll - 2


# One participant, before it joins ----------------------------------------------------------------


@pytest.fixture
def words(worded, texts):  # noqa: F811
    """The command with a participant's own text and public text."""

    def get(data="north", public="pool", windows=4):
        return [
            *("worth-it", str(worded), "--data", texts[data], "--public", texts[public]),
            *("--windows", str(windows), "--window-length", "16", "--eval-tokens", "256"),
        ]

    return get


def test_what_ones_own_text_adds_is_measured_on_text_that_no_model_saw(words):
    result = CliRunner().invoke(app, [*words(), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert list(found["perplexity"]) == ["dense", "public", "together", "own"]
    assert len(set(found["perplexity"].values())) == 4
    assert found["n_windows"] == 8
    before, after = found["perplexity"]["public"], found["perplexity"]["together"]
    gain = found["over_public"]
    assert gain["value"] == pytest.approx(1 - after / before)
    assert gain["low"] < gain["value"] < gain["high"]
    assert json.loads(CliRunner().invoke(app, [*words(), "--json"]).stdout.splitlines()[-1]) == found


def test_the_same_text_twice_adds_nothing_that_could_be_told(words):
    result = CliRunner().invoke(app, words(data="pool"))
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "perplexity on your held-out text" in output
    assert output.count("95 % interval") == 2


def test_text_that_is_too_short_is_refused_with_what_to_do(words):
    result = CliRunner().invoke(app, words(windows=200))
    assert isinstance(result.exception, DataError)
    assert "the own text has" in str(result.exception)
    assert "expected 400, twice --windows" in str(result.exception)


@pytest.mark.parametrize("by", [0.3, 0.0, -0.2])
def test_the_interval_covers_a_known_difference(by):
    """Losses of known distribution: the interval of nearly all samples contains the true difference."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.full((60,), 15, dtype=torch.float64)
    covered = 0
    for _ in range(60):
        before = 30 + torch.randn(60, generator=draw, dtype=torch.float64)
        after = before - 15 * by + torch.randn(60, generator=draw, dtype=torch.float64)
        gain = _gain(before, after, sizes)
        covered += gain.low <= 1 - math.exp(-by) <= gain.high
    assert 50 <= covered <= 60
