"""``smaller``: the structure is chosen by the loss on held-out windows, and removed as if named."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedprllm import ConfigError, DataError, ModelError, PruneConfig, prune
from fedprllm.federation.plan import RunPlan
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.candidates import find_candidates
from fedprllm.pruning.held_out import LossSum, divided
from fedprllm.pruning.method import pruning_method
from fedprllm.study.worth import worth_it
from tests.contracts.test_walk import assert_same_bits


def files_of(folder):
    """All files of a model by name, apart from its card."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def held_out_loss(folder, windows):
    """Mean loss per token in nats, from transformers' own forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="sum")
            for window in windows
        ]
    return float(sum(losses)) / sum(len(window) - 1 for window in windows)


@pytest.fixture(scope="module")
def chosen(tiny, tmp_path_factory):
    """A run that chooses, and its participants' windows."""
    generator = torch.Generator().manual_seed(7)
    texts = [torch.randint(0, 128, (n, 16), generator=generator) for n in (9, 17)]
    config = PruneConfig(smaller=0.2, strategy="iterative")
    return prune(tiny("llama"), texts, config, out=tmp_path_factory.mktemp("smaller") / "run"), texts


def test_the_run_is_the_one_with_the_chosen_structure(tiny, chosen, tmp_path):
    result, texts = chosen
    named = PruneConfig(structure=result.record.choice.chosen.structure, strategy="iterative")
    direct = prune(tiny("llama"), texts, named, out=tmp_path / "run")
    assert files_of(result.model_dir) == files_of(direct.model_dir)
    ours, theirs = (each.record.as_json() for each in (result, direct))
    assert ours.pop("choice")["smaller"] == 0.2
    for record in (ours, theirs):
        for block in record["blocks"]:
            del block["seconds"]
    assert ours == theirs
    assert result.config == direct.config


def test_every_candidate_was_measured_on_windows_that_it_had_not_seen(tiny, chosen, tmp_path):
    result, texts = chosen
    parts = [divided(text) for text in texts]
    assert [len(held_out) for _, held_out in parts] == [1, 2]
    for number, one in enumerate(result.record.choice.candidates):
        config = PruneConfig(structure=one.structure, strategy="iterative")
        apart = prune(tiny("llama"), [learned for learned, _ in parts], config, out=tmp_path / str(number))
        windows = [window for _, held_out in parts for window in held_out]
        assert one.loss == pytest.approx(held_out_loss(apart.model_dir, windows), rel=1e-5)
        assert one.n_tokens == 3 * 15
        assert one.of_blocks == apart.record.reduction.of_blocks >= 0.2


def test_the_lowest_loss_decides(chosen):
    choice = chosen[0].record.choice
    assert [one.structure for one in choice.candidates] == ["mlp=0.38", "mlp=0.12,heads=2", "depth=1"]
    assert choice.refused.keys() == {"heads"}
    assert choice.chosen.loss == min(one.loss for one in choice.candidates)
    others = [one for one in choice.candidates if one != choice.chosen]
    lower = others[-1].model_copy(update={"loss": choice.chosen.loss / 2})
    again = choice.model_copy(update={"candidates": [choice.chosen, *others[:-1], lower]})
    assert again.chosen == lower
    assert again.sentence.startswith(f"{lower.structure}: the lowest perplexity")


@pytest.mark.parametrize("name", ["gemma3", "deepseek-v3"])
def test_candidates_remove_at_least_the_fraction(tiny, windows, tmp_path, name):
    model = BlockwiseModel(tiny(name))
    found = find_candidates(model, PruneConfig(smaller=0.2))
    assert (
        found.structures
        == {
            "gemma3": ["mlp=0.33", "heads=3", "mlp=0.12,heads=2", "depth=1"],  # heads=1 has no configuration
            "deepseek-v3": ["depth=2", "experts=4"],  # its first block is the smallest
        }[name]
    )
    for number, structure in enumerate(found.structures):
        result = prune(tiny(name), [windows(0)], PruneConfig(structure=structure), out=tmp_path / str(number))
        assert result.record.reduction.of_blocks >= 0.2


def test_the_least_of_each_kind_is_a_candidate(tiny, windows, tmp_path):
    found = find_candidates(BlockwiseModel(tiny("phi")), PruneConfig(smaller=0.2))
    assert found.structures == ["mlp=0.5", "heads=2", "mlp=0.17,heads=1", "depth=1"]
    less = ["mlp=0.45", "heads=1", "mlp=0.12,heads=1"]
    for number, structure in enumerate(less):
        config = PruneConfig(structure=structure)
        result = prune(tiny("phi"), [windows(0)], config, out=tmp_path / str(number))
        assert result.record.reduction.of_blocks < 0.2


def test_what_a_limit_forbids_is_no_candidate(tiny):
    model = BlockwiseModel(tiny("llama"))
    found = find_candidates(model, PruneConfig(smaller=0.2, max_update_mb=0.001))
    assert found.structures == ["depth=1"]
    assert "max_update_mb allows 0.001 MB" in found.refused["mlp"]
    # In the clear a number of 4 bytes, under masks three words.
    refused = find_candidates(model, PruneConfig(smaller=0.2, max_update_mb=1e-5)).refused
    assert "depth" not in refused
    with pytest.raises(ConfigError, match=r"depth: share influence would send 2\.4e-05 MB"):
        find_candidates(model, PruneConfig(smaller=0.2, max_update_mb=1e-5, secure=True), 3)


def test_sums_under_masks_choose_the_same(tiny, windows, tmp_path):
    texts = [windows(number) for number in range(3)]
    plain, masked = (
        prune(tiny("bloom"), texts, PruneConfig(smaller=0.2, secure=secure), out=tmp_path / str(secure))
        for secure in (False, True)
    )
    assert plain.record.choice == masked.record.choice
    assert_same_bits(plain.model_dir, masked.model_dir)


def test_text_in_one_place_and_in_another_order_chooses_the_same(tiny, windows, tmp_path):
    texts = {name: windows(number) for number, name in enumerate("ab")}
    runs = [
        prune(tiny("bloom"), given, PruneConfig(smaller=0.2, strategy=strategy), out=tmp_path / strategy)
        for given, strategy in ((texts, "one-shot"), (dict(reversed(texts.items())), "centralized"))
    ]
    assert runs[0].record.choice == runs[1].record.choice
    assert files_of(runs[0].model_dir) == files_of(runs[1].model_dir)


def test_losses_add_up_to_the_same_bits_in_any_order():
    losses = [LossSum.of(loss, 15) for loss in (1 / 3, 60.1, 7e6, 1e-7)]
    assert sum(losses, LossSum()) == sum(reversed(losses), LossSum())
    assert LossSum.of(30.0, 15).mean == 2.0


def test_a_killed_run_continues_with_the_same_bits(tiny, chosen, tmp_path, monkeypatch):
    from fedprllm.models.checkpoint import CheckpointWriter

    whole, texts = chosen
    config = PruneConfig(smaller=0.2, strategy="iterative")
    write, n_written = CheckpointWriter.write, []

    def dies(self, block, tensors):
        # 3 blocks of the first candidate, then 3 of the second.
        n_written.append(block)
        if len(n_written) == 5:
            raise KeyboardInterrupt
        write(self, block, tensors)

    monkeypatch.setattr(CheckpointWriter, "write", dies)
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        prune(tiny("llama"), texts, config, out=out)
    measured = json.loads((out / "choice.json").read_text())["candidates"]
    assert [one["structure"] for one in measured] == ["mlp=0.38"]
    assert [path.name for path in (out / "candidates").iterdir()] == ["1"]
    again = prune(tiny("llama"), texts, config, out=out)
    # The first candidate was not measured again, nor the second one's first block.
    assert n_written[5:] == [1, 2, 0, 1] + ([0, 1] if "depth" in again.config.structure else [0, 1, 2])
    assert again.record.choice == whole.record.choice
    assert files_of(again.model_dir) == files_of(whole.model_dir)
    assert not (out / "candidates").exists()


def test_what_was_measured_and_is_damaged_is_measured_again(tiny, windows, tmp_path):
    texts, config, out = [windows(0)], PruneConfig(smaller=0.2), tmp_path / "run"
    whole = prune(tiny("bloom"), texts, config, out=out)
    (out / "result.json").unlink()
    text = (out / "choice.json").read_text()
    (out / "choice.json").write_text(text.replace('"loss": ', '"loss": 1'))
    with pytest.warns(match=r"choice.json.*the structures are measured again"):
        again = prune(tiny("bloom"), texts, config, out=out)
    assert again.record.choice == whole.record.choice


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "mlp=0.2"}, "smaller chooses a structure, found structure mlp=0.2"),
        ({"share": "gram"}, "what is shared, found share gram"),
        ({"share": "mask"}, "what is shared, found share mask"),
        ({"strategy": "local-only"}, "found strategy local-only"),
        ({"sparsity": 0.5}, "sparsity applies to single weights"),
        ({"pattern": "2:4"}, "applies to single weights"),
        ({"allocation": "owl"}, "allocation applies"),
        ({"exclude": ["*.o_proj"]}, "exclude applies"),
        ({"criterion": "magnitude"}, "no text"),
        ({"solver": "admm"}, "solver applies"),
        ({"scale_weights": True}, "scale_weights applies"),
        ({"smaller": 0}, "greater than 0"),
        ({"smaller": 1}, "less than 1"),
    ],
)
def test_contradictions_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        PruneConfig(**{"smaller": 0.2, **options})


def test_options_are_kept_when_the_structure_is_known():
    config = PruneConfig(smaller=0.2, windows=3, memory_limit="1GiB", strategy="iterative", seed=5)
    named = PruneConfig(structure="depth=1", windows=3, memory_limit="1GiB", strategy="iterative", seed=5)
    assert config.with_structure("depth=1") == named
    assert config.goal == "blocks with at least 20% fewer parameters"


def test_too_much_is_refused_with_a_reason_for_every_structure(tiny, windows, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        prune(tiny("llama"), [windows(0)], PruneConfig(smaller=0.9), out=tmp_path / "run")
    words = str(refusal.value)
    assert "makes its blocks 90.0% smaller" in words
    assert "\n  mlp: removing 46 of 48 channels from every block" in words
    assert "\n  heads: removing 2 of 4 heads from every block" in words
    assert "\n  depth: structure depth would drop 3 of 3 blocks" in words
    assert not (tmp_path / "run").exists()


def test_a_participant_with_one_window_cannot_hold_one_out(tiny, windows, tmp_path):
    texts = {"north": windows(0, 4), "south": windows(1, 1)}
    with pytest.raises(DataError, match="participant 'south' has 1 window"):
        prune(tiny("llama"), texts, PruneConfig(smaller=0.2), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_candidate_that_gives_no_model_is_left_out(tiny, windows, tmp_path, monkeypatch):
    from fedprllm.pruning import result_writer

    def refuses(*_):
        raise ModelError("something else at another position")

    monkeypatch.setattr(result_writer, "write_shorter", refuses)
    result = prune(tiny("gpt2"), [windows(0, 3)], PruneConfig(smaller=0.2), out=tmp_path / "run")
    assert result.config.structure == "mlp=0.3"
    assert result.record.choice.refused["depth=1"] == "something else at another position"
    with pytest.raises(ModelError, match=r"none of the structures depth=1 gives a model:\n  mlp: no entry"):
        prune(tiny("bloom"), [windows(0, 3)], PruneConfig(smaller=0.2), out=tmp_path / "none")


def test_models_that_are_compared_lose_one_structure(tiny):
    with pytest.raises(ConfigError, match="another structure for every model that is compared"):
        worth_it(tiny("llama"), ["own.txt"], ["public.txt"], PruneConfig(smaller=0.2))


def test_a_federation_names_the_structure():
    with pytest.raises(ConfigError, match=r"'fedprllm prune --smaller 0.2' on text that you may use.*"):
        RunPlan(name="run", model="m", prune={"smaller": 0.2})
    with pytest.raises(ConfigError, match="name the structure"):
        pruning_method(PruneConfig(smaller=0.2))
