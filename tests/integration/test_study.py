"""The study: a cell decided from stored walks equals an ordinary run, and nothing is computed twice."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedprllm import ConfigError, DataError, PruneConfig, RunError
from fedprllm.cli.app import app
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.participant import Participant
from fedprllm.study import runner
from fedprllm.study.data import StudyData, split
from fedprllm.study.kept_updates import KeptWalks, is_served
from fedprllm.study.measure import Lab, passes
from fedprllm.study.questions import Cell, StudyConfig, cells_of
from fedprllm.study.runner import study
from fedprllm.text.documents import read_documents
from tests.integration.test_damage import DAMAGES

WORDS = [f"w{number}" for number in range(120)]


@pytest.fixture(scope="session")
def worded(tiny, tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer of 120 words."""
    import shutil

    folder = tmp_path_factory.mktemp("worded") / "model"
    shutil.copytree(tiny("llama"), folder)
    words = {"<unk>": 0, **{word: number for number, word in enumerate(WORDS, start=1)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "w0"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict[str, str]:
    """Files by name; their word frequencies differ."""
    folder = tmp_path_factory.mktemp("texts")
    paths = {}
    for number, name in enumerate(("pool", "test", "north", "south")):
        draw = random.Random(number)
        weights = [draw.random() ** 4 for _ in WORDS]
        lines = [json.dumps({"text": " ".join(draw.choices(WORDS, weights, k=24))}) for _ in range(60)]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(lines))
        paths[name] = str(path)
    return paths


def small(worded: Path, texts: dict[str, str], **options) -> StudyConfig:
    values = {
        "model": str(worded),
        "data": (texts["pool"],),
        "eval": (texts["test"],),
        "participants": (3, 2),
        "windows": (2,),
        "seeds": (0, 1),
        "window_length": 16,
        "eval_tokens": 64,
    }
    return StudyConfig(**(values | options))


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


# Stored walks -----------------------------------------------------------------------------------

SERVED = [
    {},
    {"sparsity": 0.3},
    {"server_group": "row"},
    {"server_group": "column", "server_ties": "magnitude"},
    {"server_ties": "random", "seed": 3},
    {"local_group": "layer", "server_group": "layer"},
    {"scale_weights": True},
    {"weighting": "tokens"},
    {"pattern": "2:4"},
    {"criterion": "ria"},
    {"criterion": "magnitude"},
    {"ties": "random", "seed": 2},
    {"share": "statistics"},
    {"strategy": "centralized"},
    {"strategy": "local-only"},
]


@pytest.mark.parametrize("options", SERVED, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_cell_from_kept_walks_is_an_ordinary_run(architecture, options, tiny, windows, tmp_path):
    config = PruneConfig(**({"window_length": 16} | options))
    assert is_served(config)
    model = BlockwiseModel(tiny(architecture))
    participants = [Participant(f"p{number}", windows(number, 2 + number)) for number in range(3)]
    text = {"text": list(windows(9, 3))}
    lab = Lab(model, KeptWalks(model, "digest", tmp_path / "walks"), tmp_path / "runs")
    cell = Cell(config, 3, "iid")
    kept = lab._from_walks(cell, participants, text, 3, lambda _: None)
    run = lab._from_run(cell, participants, text, 3, lambda _: None)
    assert list(kept.models.values()) == list(run.models.values())
    if config.strategy != "local-only":  # a run counts the last participant's, a study their mean
        for count in ("n_zeros", "n_pruned"):
            assert getattr(kept, count) == getattr(run, count), count
    if config.strategy == "one-shot":
        assert kept.n_ties == run.n_ties


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "iterative"},
        {"share": "gram"},
        {"share": "weights"},
        {"allocation": "owl"},
        {"block_fraction": "0.5"},
    ],
    ids=str,
)
def test_what_walks_cannot_serve_is_run(options):
    assert not is_served(PruneConfig(**options))


def test_only_what_a_walk_depends_on_makes_a_new_one(tiny, windows, tmp_path):
    model = BlockwiseModel(tiny("llama"))
    walks = KeptWalks(model, "digest", tmp_path)
    participant = Participant("a", windows(0))

    def key(**options) -> str:
        return walks.key(participant, PruneConfig(**options))

    same = [{"server_group": "row"}, {"scale_weights": True}, {"server_ties": "random"}, {"seed": 4}]
    assert {key(**options) for options in same} == {key()}
    other = [{"sparsity": 0.4}, {"local_group": "layer"}, {"criterion": "ria"}, {"ties": "random"}]
    assert len({key(**options) for options in other} | {key()}) == len(other) + 1
    assert key(ties="random", seed=1) != key(ties="random")
    assert key(share="statistics") == key(share="statistics", sparsity=0.4, criterion="ria")
    assert walks.key(Participant("a", windows(1)), PruneConfig()) != key()


# The plan ----------------------------------------------------------------------------------------


def test_a_cell_that_serves_several_questions_is_measured_once(worded, texts):
    cells = cells_of(small(worded, texts))
    assert len({cell.key for cell in cells}) == len(cells)
    base = [cell for cell in cells if cell.config == PruneConfig(windows=2, window_length=16)]
    (cell,) = [cell for cell in base if cell.participants == 3]
    assert {"methods", "groups", "ties", "scaling", "rounds", "participants", "sharing"} <= set(
        cell.questions
    )


def test_questions_about_domains_are_asked_where_there_are_domains(worded, texts):
    assert "domains" not in small(worded, texts).asked
    domains = (texts["north"], texts["south"])
    assert small(worded, texts, data=(), eval=(), domains=domains).asked == ["domains"]
    assert "groups" in small(worded, texts, domains=domains).asked


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"questions": ("group",)}, "did you mean 'groups'"),
        ({"questions": ("domains",)}, "needs at least two domains, found 0"),
        ({"data": ()}, "no text: name data to distribute"),
        ({"eval": ()}, "no text to measure on"),
        ({"sparsity": ()}, "sparsity"),
        ({"participants": (0,)}, "participants"),
        ({"seed": (1,)}, "did you mean 'seeds'"),
    ],
)
def test_a_study_that_cannot_be_is_refused(options, pattern, worded, texts):
    with pytest.raises(ConfigError, match=pattern):
        small(worded, texts, **options)


@pytest.mark.parametrize(
    ("grid", "pattern"),
    [
        ({"server_grop": ["row"]}, "grid 1: unknown option .*did you mean 'server_group'"),
        ({"sparsity": [1.5]}, "grid 1: sparsity must lie in"),
        ({"share": ["statistics"], "scale_weights": [True]}, "grid 1: scale_weights applies to votes"),
        ({"partition": ["dirichlet"]}, "grid 1: partition dirichlet needs domains"),
        ({"seed": [1]}, "grid 1: seed cannot be an axis: .*seeds"),
        ({"dtype": ["bfloat16"]}, "grid 1: dtype cannot be an axis: .*whole study"),
        ({"device": ["cuda"]}, "grid 1: device cannot be an axis"),
        ({"memory_limit": [1, None]}, "grid 1: memory_limit cannot be an axis: it does not affect"),
        ({"max_update_mb": [1.0]}, "grid 1: max_update_mb cannot be an axis"),
        ({"participants": [0]}, "grid 1: participants must be whole numbers from 1 on, found 0"),
        ({"participants": ["2"]}, "grid 1: participants must be .*found '2'"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(grid, pattern, worded, texts):
    with pytest.raises(ConfigError, match=pattern):
        cells_of(small(worded, texts, questions=("methods",), grid=(grid,)))


def test_smaller_models_are_runs_of_their_own(worded, texts, tmp_path):
    grid = {"structure": ["mlp=0.3", "depth=1"], "participants": [2]}
    config = small(worded, texts, questions=(), grid=(grid,), seeds=(0,))
    model = BlockwiseModel(worded)
    data = StudyData(model, config, tmp_path / "texts")
    lab = Lab(model, KeptWalks(model, "digest", tmp_path / "walks"), tmp_path / "runs")
    for cell in cells_of(config):
        assert cell.config.sparsity == 0
        record = lab.measure(cell, data.participants(cell), data.texts(cell), 1, lambda _: None)
        assert (record.made, record.n_pruned) == ("run", 0)
        assert record.models["model"] != record.models.get("dense")


def test_participants_are_no_axis_where_each_domain_is_one(worded, texts):
    domains = (texts["north"], texts["south"])
    grid = {"partition": ["domain"], "participants": [2, 3]}
    with pytest.raises(ConfigError, match="participants cannot be an axis with partition domain"):
        cells_of(small(worded, texts, domains=domains, grid=(grid,)))


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("participants", [2, 5]),
        ("window_length", [8, 16]),
        ("bos", ["never", "every"]),
        ("sparsity", [0.5, 0.501]),
    ],
)
def test_every_axis_of_a_grid_reaches_what_is_computed(worded, texts, tmp_path, axis, values):
    """Each cell is an ordinary run over as many participants, windows and tokens as its label says."""
    grid = {axis: values, "participants": [2]} | ({axis: values} if axis == "participants" else {})
    config = small(worded, texts, questions=(), grid=(grid,), seeds=(0,))
    data = StudyData(BlockwiseModel(worded), config, tmp_path / "texts")
    cells = cells_of(config)
    assert len({cell.key for cell in cells}) == len(values)
    model = BlockwiseModel(worded)
    lab = Lab(model, KeptWalks(model, "digest", tmp_path / "walks"), tmp_path / "runs")
    for cell in cells:
        people = data.participants(cell)
        wanted = {"participants": cell.participants, **cell.setting}
        assert len(people) == cell.participants
        assert all(one.windows.shape == (wanted["windows"], wanted["window_length"]) for one in people)
        with_bos = [bool((one.windows[:, 0] == 1).all()) for one in people]
        assert with_bos == [wanted["bos"] == "every"] * len(people)
        kept = lab._from_walks(cell, people, data.texts(cell), 1, lambda _: None)
        run = lab._from_run(cell, people, data.texts(cell), 1, lambda _: None)
        assert kept.models["model"] == run.models["model"]
        assert (kept.made, run.made) == ("derived", "run")
        assert kept.participants == [one.name for one in people]


@pytest.mark.parametrize("long", [False, True], ids=["documents", "paragraphs"])
def test_a_domain_is_split_without_loss(tmp_path, long):
    path = tmp_path / ("a.txt" if long else "a.jsonl")
    documents = [f'number {number} \u00e9 "quoted" \\ ' + "word " * (number % 7) for number in range(300)]
    lines = [json.dumps({"text": document}) for document in documents]
    path.write_text("\n\n".join(documents) if long else "\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedprllm.text.decoding._BLOCK", 37)
        calibration, held_out = split([str(path)], "a", tmp_path / "parts", 10_000)
    parts = read_documents(calibration), read_documents(held_out)
    assert sorted([*parts[0], *parts[1]]) == sorted(documents)
    assert len(parts[1]) == 60


def test_a_domain_is_split_in_pieces(tmp_path):
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"text": f"{n} " + "word " * 500}) + "\n" for n in range(4000))
    tracemalloc.start()
    try:
        split([str(path)], "a", tmp_path / "parts", 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 5 * peak


def test_too_little_text_is_refused_before_anything_is_computed(worded, texts, tmp_path):
    with pytest.raises(DataError, match="expected 5000: provide more text"):
        study(small(worded, texts, windows=(5000,)), tmp_path / "out")
    assert not (tmp_path / "out" / "cells").exists()


# The whole ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(worded, texts, tmp_path_factory) -> tuple[StudyConfig, Path]:
    config = small(worded, texts, domains=(texts["north"], texts["south"]))
    out = tmp_path_factory.mktemp("study") / "out"
    study(config, out)
    return config, out


def test_a_study_writes_tables_a_page_and_plots(done):
    config, out = done
    rows = read(out / "results.csv")
    found = json.loads((out / "results.json").read_text())
    assert len(found["cells"]) == len(cells_of(config))
    n_rows = sum(len(rows) for cell in found["cells"] for rows in cell["models"].values())
    assert len(rows) == n_rows + len(found["dense"])
    page = (out / "report.html").read_text()
    for question in config.asked:
        assert f'id="{question}"' in page
    made = {cell["made"] for cell in found["cells"]}
    assert made == {"run", "derived"} == {row["made"] for row in rows if row["model"] != "dense"}
    assert "made by" in page
    assert "| made by |" in (out / "results.md").read_text()
    assert {"groups.svg", "participants.svg"} <= {path.name for path in (out / "plots").iterdir()}
    assert "Finding 2" in (out / "results.md").read_text()
    assert not (out / "unfinished").exists()


def test_what_was_measured_is_not_measured_again(done, monkeypatch):
    config, out = done
    before = (out / "results.json").read_text()
    monkeypatch.setattr(runner.Lab, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(runner.Lab, "dense", lambda *_: pytest.fail("measured again"))
    study(config, out)
    assert (out / "results.json").read_text() == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_a_study_are_measured_again(worded, texts, tmp_path, damage):
    config = small(worded, texts, questions=("scaling",), seeds=(0,), participants=(2,))
    out = tmp_path / "out"

    def numbers() -> dict:
        found = json.loads((out / "results.json").read_text())
        for cell in found["cells"]:
            cell.pop("seconds")
        return found

    study(config, out)
    expected, page = numbers(), (out / "report.html").read_bytes()
    files = [*out.glob("cells/*.json"), *out.glob("walks/*/*"), *out.glob("texts/*"), *out.glob("results.*")]
    assert len(files) > 10
    for path in files:
        DAMAGES[damage](path)
    (out / "report.html").unlink()
    study(config, out)
    assert numbers() == expected
    assert len((out / "report.html").read_bytes()) == pytest.approx(len(page), abs=200)  # seconds differ


def test_one_damaged_update_makes_one_walk_again(tiny, windows, tmp_path, monkeypatch):
    model = BlockwiseModel(tiny("llama"))
    people = [Participant(f"p{number}", windows(number)) for number in range(2)]
    config = PruneConfig(window_length=16)
    walks = KeptWalks(model, "digest", tmp_path)
    for one in people:
        walks.of(one, config, lambda _: None)
    DAMAGES["bit"](tmp_path / walks.key(people[0], config) / "block-0001.safetensors")
    again = KeptWalks(model, "digest", tmp_path)
    assert [again.has(one, config) for one in people] == [False, True]
    steps: list[int] = []
    again.of(people[0], config, steps.append)
    assert sum(steps) == 2 * 2 * model.n_blocks
    assert again.has(people[0], config)


def test_progress_comes_out_even(worded, texts, tmp_path):
    from contextlib import contextmanager

    planned, made = {}, {}

    @contextmanager
    def progress(description: str, total: int):
        planned[description], made[description] = total, 0

        def advance(steps: int) -> None:
            made[description] += steps

        yield advance

    study(small(worded, texts, seeds=(0,)), tmp_path / "out", progress)
    (name,) = [name for name in planned if name.startswith("studying")]
    assert made[name] == pytest.approx(planned[name], rel=0.05)


def test_votes_are_counted_once_for_all_that_the_server_may_do(worded, texts, tmp_path):
    config = small(worded, texts, questions=("groups", "ties", "scaling"), seeds=(0,))
    out = tmp_path / "out"
    study(config, out)
    # Three local groups times three participants: no other walks were computed.
    assert len([*(out / "walks").iterdir()]) == 9


def test_one_process_at_a_time(done, monkeypatch):
    from filelock import FileLock

    config, out = done
    with FileLock(out / ".lock"), pytest.raises(RunError, match="another process is working on"):
        study(config, out)


def test_passes_count_what_is_left(tiny, windows, tmp_path):
    model = BlockwiseModel(tiny("llama"))
    walks = KeptWalks(model, "digest", tmp_path)
    participants = [Participant("a", windows(0)), Participant("b", windows(1))]
    cell = Cell(PruneConfig(), 2, "iid")
    assert sum(passes(cell, participants, walks).values()) == 2 * 2 * 2
    walks.of(participants[0], cell.config, lambda _: None)
    assert sum(passes(cell, participants, walks).values()) == 2 * 2
    dense = Cell(PruneConfig(share="statistics"), 2, "iid")
    assert sum(passes(dense, participants, walks).values()) == 2 * 2
    assert passes(Cell(PruneConfig(criterion="magnitude"), 2, "iid"), participants, walks) == {}


def test_the_command(worded, texts, tmp_path, capsys):
    words = ["study", str(worded), "--data", texts["pool"], "--eval", texts["test"], "--out", str(tmp_path)]
    words += ["--questions", "scaling", "--participants", "2", "--seeds", "0", "--window-length", "16"]
    words += ["--eval-tokens", "64", "--sparsity", "0.5,0.25"]
    with pytest.raises(SystemExit) as ended:
        app(words)
    assert ended.value.code == 0
    assert "scaled versus not scaled" in " ".join(capsys.readouterr().out.split())
    settings = {row["sparsity"] for row in read(tmp_path / "results.csv")} - {""}
    assert settings == {"0.5", "0.25"}


def test_fewer_participants_are_the_first_of_more(worded, texts, tmp_path):
    data = StudyData(BlockwiseModel(worded), small(worded, texts), tmp_path)
    config = PruneConfig(windows=2, window_length=16)
    three, two = (data.participants(Cell(config, n, "iid")) for n in (3, 2))
    assert [p.fingerprint for p in two] == [p.fingerprint for p in three[:2]]
    assert len({tuple(row) for p in three for row in p.windows.tolist()}) == 6
    assert torch.equal(two[0].windows, three[0].windows)
