"""The promises on a GPU: skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from fedprllm import HealConfig, PruneConfig, heal, prune
from fedprllm.evaluation.perplexity import evaluate
from fedprllm.healing.gradients import window_gradients
from fedprllm.healing.in_process import Learner
from fedprllm.healing.participant import HealingText
from fedprllm.healing.round_sums import RoundSums
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.open_blocks import OpenBlocks
from fedprllm.models.source import resolve_model
from fedprllm.models.tunable import TunableParameters
from fedprllm.pruning.hidden_states import HiddenMemory
from fedprllm.pruning.participant import Participant
from tests.contracts.test_walk import assert_same_bits, weights_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # torch 2.11 says so in the first backward pass of a thread, and makes the context.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

WAYS = {
    "votes": {},
    "votes, block by block": {"strategy": "iterative"},
    "votes, 2:4": {"pattern": "2:4"},
    "statistics": {"strategy": "iterative", "share": "statistics"},
    "admm": {"strategy": "iterative", "share": "gram"},
    "sparsegpt": {"strategy": "iterative", "share": "gram", "solver": "sparsegpt"},
    "alps": {"strategy": "iterative", "share": "gram", "solver": "alps"},
    "weights": {"share": "weights"},
    "secure votes": {"secure": True},
    "narrower": {"strategy": "iterative", "structure": "mlp=0.25"},
    "fewer heads": {"strategy": "iterative", "structure": "heads=2"},
}


def participants(windows):
    return [windows(0, 4), windows(1, 3), windows(2, 2)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_run_repeats_bit_by_bit_and_is_that_of_the_processor(tiny, windows, tmp_path, name, way):
    if "structure" in WAYS[way] and name != "llama":
        pytest.skip("structures are compared on one architecture")
    runs = {
        where: prune(
            tiny(name), participants(windows), PruneConfig(device=device, **WAYS[way]), out=tmp_path / where
        )
        for where, device in (("cpu", "cpu"), ("gpu", "cuda"), ("again", "cuda"))
    }
    assert_same_bits(runs["gpu"].model_dir, runs["again"].model_dir)
    found, expected = (weights_of(runs[where].model_dir) for where in ("gpu", "cpu"))
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in expected.items()
    }
    assert runs["gpu"].sparsity == runs["cpu"].sparsity
    if "structure" in WAYS[way]:
        return
    # Scores that are equal but for rounding may change places.
    same = sum(int(((found[key] == 0) == (expected[key] == 0)).sum()) for key in expected)
    assert same / sum(value.numel() for value in expected.values()) > 0.99


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_gradients_are_those_of_the_processor(tiny, windows, name):
    found = []
    for device in ("cpu", "cuda"):
        model = BlockwiseModel(resolve_model(tiny(name)), device=device)
        tunable = TunableParameters(model)
        with OpenBlocks(model, stay=False) as blocks:
            (one,) = window_gradients(
                model, tunable, tunable.initial(), [windows(0)[0]], blocks, HiddenMemory(), lambda _: None
            )
        found.append((one[0].cpu(), one[1]))
    (expected, loss), (gradient, other_loss) = found
    assert other_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("loss", ["text", "dense"])
def test_a_round_is_the_same_however_windows_are_divided(tiny, windows, tmp_path, loss):
    config = HealConfig(device="cuda", loss=loss, round_windows=8, window_length=16)
    model = BlockwiseModel(resolve_model(tiny("llama")), device="cuda")
    dense = BlockwiseModel(resolve_model(tiny("llama")), device="cuda") if loss == "dense" else None
    pooled, totals = windows(0, 8), []
    for n in (1, 2, 8):
        parts = [HealingText(Participant(f"p{number}", part)) for number, part in enumerate(pooled.chunk(n))]
        for text, part in zip(parts, pooled.chunk(n), strict=True):
            text.training, text.held_out = part, part[:0]
        share = config.model_copy(update={"round_windows": 8 // n})
        with Learner(model, share, tmp_path / "spilled", dense) as learner:
            vector = learner.tunable.initial() * 1.01
            sums = learner.contribute(parts, vector, 1).values()
        totals.append(sum(sums, start=RoundSums.zeros(learner.tunable.n)).words)
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])


def test_healing_and_evaluation(tiny, windows, tmp_path):
    pruned = prune(tiny("llama"), participants(windows), PruneConfig(device="cuda"), out=tmp_path / "run")
    config = HealConfig(rounds=3, device="cuda", learning_rate=0.01)
    one, other = (
        heal(pruned.model_dir, participants(windows), config, out=tmp_path / name) for name in ("a", "b")
    )
    assert_same_bits(one.model_dir, other.model_dir)
    before = weights_of(pruned.model_dir)
    assert all(((value == 0) == (before[key] == 0)).all() for key, value in weights_of(one.model_dir).items())


def test_perplexity_is_that_of_the_processor(small_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The participants prune one model together. " * 40)
    (cpu,), (gpu,) = (
        evaluate(small_model, [text], window_length=64, device=device) for device in ("cpu", "cuda")
    )
    assert gpu.nll == pytest.approx(cpu.nll, rel=1e-5)


def test_one_block_is_on_the_gpu_at_a_time(tiny):
    model = BlockwiseModel(resolve_model(tiny("llama")), device="cuda")
    n_bytes = sum(parameter.numel() for parameter in model.skeleton.parameters()) * 4
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for index in range(model.n_blocks):
        with model.block(index):
            pass
    assert torch.cuda.max_memory_allocated() - before < n_bytes / 2
