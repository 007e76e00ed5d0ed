"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedprllm.cli.app import app
from fedprllm.cli.naming import named_texts
from fedprllm.config import PruneConfig
from fedprllm.errors import FedprllmError
from tests.library_text import library_text


def run(*words: object) -> str:
    """Run a command line; a word may hold several, parted by blanks."""
    result = CliRunner().invoke(app, " ".join(map(str, words)).split())
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def given(small_model, tmp_path) -> dict[str, Path]:
    """The small trained model, and three texts."""
    text = library_text("prose")
    paths = {"model": small_model}
    for number, name in enumerate(("a", "b", "c")):
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text(text[number * 20_000 : (number + 1) * 20_000])
    return paths


def test_help_names_every_option_with_its_default():
    output = run("prune", "--help")
    for name, field in PruneConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in output
        assert field.description
    assert "default: one-shot" in " ".join(output.replace("│", " ").split())


def test_prune_says_which_structure_it_chose(given, tmp_path):
    output = run(
        "prune", given["model"], "--participant", given["a"], "--participant", given["b"], "--windows 2",
        "--window-length 32 --smaller 0.15 --out", tmp_path / "run",
    )  # fmt: skip
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    words = " ".join(output.split())
    assert f"chosen {result['config']['structure']}: the lowest perplexity on 62 held-out tokens" in words
    assert result["reduction"] is not None


def test_prune_evaluate_report(given, tmp_path):
    out = tmp_path / "run"
    output = run(
        "prune", given["model"], "--participant", given["a"], "--participant", given["b"], "--windows 4",
        "--window-length 128 --sparsity 0.3 --eval", given["c"], "--out", out,
    )  # fmt: skip
    assert "30.00% of" in output or "29.99% of" in output
    measured = json.loads((out / "result.json").read_text())["evaluation"]
    assert set(measured) == {"dense", "model"}
    output = run(
        "evaluate",
        out / "model",
        "--text",
        given["c"],
        "--text",
        given["a"],
        "--window-length",
        128,
        "--json",
    )
    rows = json.loads(output[output.index("{") :])["perplexity"]
    assert [row["text"] for row in rows] == ["c", "a"]
    assert rows[0]["perplexity"] == pytest.approx(measured["model"][0]["perplexity"], rel=1e-6)
    assert rows[0]["perplexity"] > measured["dense"][0]["perplexity"] > 1
    run("report", out)
    assert (out / "report.html").read_text().startswith("<!")


def test_configuration_file_gives_the_same_run(given, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        f'model = "{given["model"]}"\nparticipant = ["{given["a"]}", "{given["b"]}"]\n'
        f'out = "{tmp_path / "from-file"}"\nwindows = 2\nwindow-length = 64\n'
        'sparsity = 0.4\nties = "random"\n'
    )
    run("prune", "--config", config, "--sparsity", 0.2)
    run(
        "prune", given["model"], "--participant", given["a"], "--participant", given["b"],
        "--windows 2 --window-length 64 --sparsity 0.2 --ties random --out", tmp_path / "from-words",
    )  # fmt: skip
    one, other = (
        json.loads((tmp_path / name / "run.json").read_text()) for name in ("from-file", "from-words")
    )
    assert one == other
    assert one["config"]["sparsity"] == 0.2


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "file"])
def test_data_dealt_out(given, tmp_path, partition):
    run(
        "prune", given["model"], "--data", given["a"], "--data", given["b"],
        "--participants", 2, "--partition", partition, "--windows", 3,
        "--window-length", 64, "--out", tmp_path / "run",
    )  # fmt: skip
    people = json.loads((tmp_path / "run" / "run.json").read_text())["participants"]
    assert len(people) == 2
    assert sum(person["n_windows"] for person in people.values()) == 6


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["prune"], "no model"),
        (["prune", "m"], "no out"),
        (["prune", "m", "--out", "o", "--participants", "3"], "--participants needs --data"),
        (["prune", "m", "--out", "o", "--data", "d"], "needs --participants"),
        (["prune", "m", "--out", "o", "--data", "d", "--participant", "p"], "not both"),
        (["prune", "m", "--out", "o", "--strategy", "oneshot"], "did you mean 'one-shot'"),
        (["prune", "--config", "nowhere.toml"], "cannot read nowhere.toml"),
        (["evaluate", "m"], "nothing to evaluate on"),
        (["report", "nowhere"], "no folder nowhere"),
    ],
)
def test_mistakes(words, pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedprllmError, match=pattern):
        run(*words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("sparsty = 0.5", "unknown option 'sparsty'; did you mean 'sparsity'"),
        ("sparsity = ", "not valid TOML"),
        ('participant = "a.txt"', "participant must be a list"),
    ],
)
def test_mistakes_in_a_configuration_file(tmp_path, text, pattern):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(FedprllmError, match=pattern):
        run("prune", "--config", tmp_path / "run.toml")


def test_a_mistake_is_one_message_without_a_traceback(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fedprllm.cli.app",
        "prune",
        "nowhere/model",
        "--participant",
        "a.txt",
        "--out",
        "o",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


def test_prune_says_how_much_smaller_the_model_became(given, tmp_path):
    out = tmp_path / "run"
    output = run(
        "prune", given["model"], "--participant", given["a"], "--participant", given["b"], "--windows 4",
        "--window-length 128 --structure mlp=0.25 --strategy iterative --out", out,
    )  # fmt: skip
    found = json.loads((out / "result.json").read_text())["reduction"]
    before, after = found["n_block_parameters"]
    assert f"{1 - after / before:.1%} fewer parameters in the blocks" in output
    assert "{:,} → {:,} parameters".format(*found["n_parameters"]) in output
    assert "are zero" not in output
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (
        given["model"], out / "model")]  # fmt: skip
    assert found["n_bytes"] == sizes


def test_participants_and_texts_can_be_named(given, tmp_path):
    out = tmp_path / "run"
    run(
        "prune", given["model"], f"--participant north={given['a']} --participant north={given['b']}",
        "--participant", given["c"], f"--eval prose={given['c']}",
        "--windows 4 --window-length 64 --out", out,
    )  # fmt: skip
    record = json.loads((out / "result.json").read_text())
    assert list(record["participants"]) == ["c", "north"]
    assert record["participants"]["north"]["sources"] == [str(given["a"]), str(given["b"])]
    assert [row["text"] for row in record["evaluation"]["dense"]] == ["prose"]


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.txt").touch()
    assert named_texts(["a=b.txt"], "participant") == ["a=b.txt"]
    assert named_texts(["x=a=b.txt", "c.txt"], "participant") == {"x": ["a=b.txt"], "c": ["c.txt"]}
    with pytest.raises(FedprllmError, match=r"--participant -x=y: '-x' cannot be a name"):
        named_texts(["-x=y"], "participant")
