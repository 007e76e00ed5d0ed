"""The command ``heal``, ``prune --heal`` and the report about it."""

from __future__ import annotations

import json
import math
import re

import pytest

from fedprllm import ConfigError, HealConfig, HealResult
from fedprllm.errors import FedprllmError
from fedprllm.files import write_sealed
from fedprllm.report.page import write_report
from tests.contracts.test_walk import assert_same_bits
from tests.report_pages import Page
from tests.unit import test_cli
from tests.unit.test_cli import run

given = test_cli.given  # a fixture
HEALING = "--windows 8 --window-length 64 --check-every 2"


def texts(given):
    return f"--participant {given['a']} --participant {given['b']}"


@pytest.fixture
def pruned(given, tmp_path):
    out = tmp_path / "run"
    run("prune", given["model"], texts(given), "--windows 4 --window-length 64 --out", out)
    return out


def test_help_names_every_option_with_its_default():
    output = " ".join(run("heal", "--help").replace("│", " ").split())
    for name, field in HealConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in output
        assert field.description
    assert "default: 0.003" in output


def test_a_run_is_healed_beside_its_model_and_reported(given, pruned):
    output = run("heal", pruned, texts(given), HEALING, "--rounds 4 --eval", given["c"])
    result = HealResult.load(pruned / "healed")
    assert result.record.config.rounds == 4
    assert result.record.model.source == str(pruned / "model")
    assert re.search(r"loss on held-out windows: \d\.\d{4} before", output)
    assert "3,704 of 260,032 parameters trained" in output
    assert "before" in output
    assert str(result.model_dir) in output.replace("\n", "")
    run("report", pruned / "healed")
    page = (pruned / "healed" / "report.html").read_text()
    assert "healing report" in page
    assert "Loss by round" in page
    assert (result.model_dir / "README.md").read_text().count("## Healed") == 1


def page_of(folder, change):
    """The page of a healing whose record was changed."""
    result = json.loads((folder / "result.json").read_text())
    change(result)
    write_sealed(folder / "result.json", result)
    return Page(write_report(folder))


def test_the_page_answers_first_and_says_no_false_word(given, pruned):
    run("heal", pruned, texts(given), HEALING, "--rounds 2 --eval", given["c"])
    folder = pruned / "healed"

    def values(before, healed):
        def change(result):
            for name, value in (("before", before), ("healed", healed)):
                for row in result["evaluation"][name]:
                    row |= {"perplexity": value, "nll": math.log(value)}

        return change

    def unhealed(result):
        result["best_round"] = 0

    def federated(result):
        result |= {"run_id": "ab" * 16, "notes": ["<b> was loud"]}
        result["config"]["secure"] = True
        result["evaluation"] = {}

    (text,) = (
        row["text"] for row in json.loads((folder / "result.json").read_text())["evaluation"]["before"]
    )
    page = page_of(folder, lambda result: result.update(best_round=2))
    assert page.headings[:2] == ["What you got", "Did it pay off?"]
    assert 'from_pretrained("healed/model")' in page.text
    worse = page_of(folder, values(10.0, 11.0))
    assert worse.verdicts[0] == f"Healing did not lower the perplexity on {text}: 10.00 → 11.00 (+10.0 %)."
    better = page_of(folder, values(10.0, 9.0))
    assert better.verdicts[0] == f"Healing lowered the perplexity on {text}: 10.00 → 9.00 (-10.0 %)."
    assert better.left["seen by the server"] == "each participant's gradients, one by one"
    assert page_of(folder, unhealed).verdicts[0].startswith("Healing did not pay off:")
    masked = page_of(folder, federated)
    assert masked.left["seen by the server"] == "only sums over participants"
    assert "<b>" not in masked.html
    assert "nothing left the machine" not in masked.text


def test_a_run_is_healed_towards_the_model_that_it_pruned(given, pruned, tmp_path):
    run("heal", pruned, texts(given), HEALING, "--rounds 2 --loss dense")
    found = HealResult.load(pruned / "healed")
    assert found.record.dense.source == str(given["model"])
    out = tmp_path / "at-once"
    options = "--windows 8 --window-length 64 --heal 2 --heal-loss dense --out"
    run("prune", given["model"], texts(given), options, out)
    assert HealResult.load(out / "healed").record.config.loss == "dense"
    with pytest.raises(ConfigError, match="give --heal N too"):
        run("prune", given["model"], texts(given), "--heal-loss dense --out", tmp_path / "no")


def test_what_a_run_left_dense_gets_no_scale(given, tmp_path):
    out = tmp_path / "run"
    options = "--windows 4 --window-length 64 --exclude *.o_proj --out"
    run("prune", given["model"], texts(given), options, out)
    run("heal", out, texts(given), HEALING, "--rounds 2")
    record = HealResult.load(out / "healed").record
    assert record.config.exclude == ("*.o_proj",)
    assert record.n_parameters == 3704 - 5 * 64
    run("heal", out, texts(given), HEALING, "--rounds 2 --exclude *.q_proj --out", tmp_path / "other")
    assert HealResult.load(tmp_path / "other").record.config.exclude == ("*.q_proj",)
    run("heal", out / "healed", texts(given), HEALING, "--rounds 1")
    assert HealResult.load(out / "healed" / "healed").record.config.exclude == ("*.o_proj",)


def test_prune_heals_with_the_same_text_and_options(given, tmp_path):
    out = tmp_path / "both"
    options = "--windows 4 --window-length 64 --heal 3 --out"
    output = run("prune", given["model"], texts(given), options, out)
    assert "healed" in output
    record = HealResult.load(out / "healed").record
    assert (record.config.rounds, record.config.window_length) == (3, 64)
    run("heal", out / "model", texts(given), "--window-length 64 --rounds 3 --out", tmp_path / "apart")
    assert_same_bits(out / "healed" / "model", tmp_path / "apart" / "model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["heal", "m", "--rounds", "3"], "no out: name a folder"),
        (["heal", "m", "--out", "o", "--participants", "3"], "--participants needs --data"),
        (["heal", "m", "--out", "o", "--bos", "evry"], "did you mean 'every'"),
        (["prune", "m", "--out", "o", "--strategy", "local-only", "--heal", "3"], "--heal heals one model"),
    ],
)
def test_mistakes(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedprllmError, match=message):
        run(*words)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_model_is_refused(pruned, given):
    (pruned / "model").rename(pruned / "moved")
    with pytest.raises(ConfigError, match="has no folder 'model'"):
        run("heal", pruned, texts(given))


def test_a_run_and_a_healing_are_not_taken_for_each_other(given, pruned):
    with pytest.raises(FedprllmError, match="belongs to another run"):
        run("heal", pruned / "model", texts(given), HEALING, "--out", pruned)
