"""Healing: gradients as autograd's, sums that depend on no order, and a result in the form of its source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedprllm import (
    ConfigError,
    Documents,
    FedprllmWarning,
    HealConfig,
    ModelError,
    PruneConfig,
    SecureError,
    UpdateError,
    heal,
    prune,
)
from fedprllm.healing.bounds import outstanding_gradients
from fedprllm.healing.gradients import backward_bytes, held_out_losses, window_gradients
from fedprllm.healing.in_process import Learner
from fedprllm.healing.objectives import DenseDistance
from fedprllm.healing.participant import HealingText
from fedprllm.healing.round_sums import RoundSums
from fedprllm.healing.server import HealingServer
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.open_blocks import OpenBlocks
from fedprllm.models.source import resolve_model
from fedprllm.models.tunable import TunableParameters
from fedprllm.pruning.hidden_states import HiddenMemory
from fedprllm.pruning.participant import Participant
from tests.contracts.test_walk import assert_same_bits, weights_of
from tests.library_text import KINDS, library_text
from tests.models import ARCHITECTURES, MIXTURES
from tests.naive_run import Whole

CONFIG = HealConfig(rounds=4, check_every=2, learning_rate=0.01, window_length=16)


def opened(folder: Path) -> tuple[BlockwiseModel, TunableParameters]:
    model = BlockwiseModel(resolve_model(folder))
    return model, TunableParameters(model)


def gradients(
    model: BlockwiseModel,
    tunable: TunableParameters,
    vector: Tensor,
    windows: Tensor,
    *,
    stay: bool = False,
    keep: bool = False,
) -> list[tuple[Tensor, float]]:
    with OpenBlocks(model, stay=stay) as blocks:
        return window_gradients(
            model, tunable, vector, list(windows), blocks, HiddenMemory(), lambda _: None, keep=keep
        )


def losses(model: BlockwiseModel, tunable: TunableParameters, vector: Tensor, windows: Tensor) -> list[float]:
    with OpenBlocks(model, stay=False) as blocks:
        return held_out_losses(model, tunable, vector, list(windows), blocks, lambda _: None)


# Gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES | MIXTURES)
def test_the_gradient_is_that_of_autograd_on_the_whole_model(name, tiny, windows):
    model, tunable = opened(tiny(name))
    (gradient, loss), _ = gradients(model, tunable, tunable.initial(), windows(0))
    whole = Whole(tiny(name)).model
    for parameter in whole.parameters():
        parameter.requires_grad_()
    window = windows(0)[0]
    expected = torch.nn.functional.cross_entropy(
        whole(window[None]).logits[0, :-1], window[1:], reduction="sum"
    )
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    parameters, compared = dict(whole.named_parameters()), 0
    for one in tunable.slices:
        if (parameter := parameters.get(one.name)) is None or parameter.grad is None:
            continue  # experts, which the whole model holds fused
        found, wanted = gradient[one.start : one.start + one.n], parameter.grad
        if one.linear is not None:
            wanted = (one.linear.stored(wanted) * one.linear.stored(parameter.detach())).sum(1)
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())), one.name
        compared += one.n
    assert compared > tunable.n // (5 if name in MIXTURES else 2)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_gradient_of_experts_predicts_how_the_loss_changes(name, tiny, windows):
    model, tunable = opened(tiny(name))
    vector = tunable.initial()
    (gradient, _), _ = gradients(model, tunable, vector, windows(0))
    direction = torch.zeros_like(vector)
    for one in tunable.slices:
        if one.linear is not None and one.linear.family:
            direction[one.start : one.start + one.n] = gradient[one.start : one.start + one.n]
    assert direction.any(), "no expert was reached"
    step = 0.01 / float(direction.norm())
    up, down = (
        losses(model, tunable, vector + sign * step * direction, windows(0)[:1])[0] for sign in (1, -1)
    )
    assert (up - down) / (2 * step) == pytest.approx(float(gradient @ direction), rel=0.03)


def test_vectors_that_are_used_before_the_blocks_are_not_trained(tiny):
    _, tunable = opened(tiny("bloom"))
    outside = [one.name for one in tunable.slices if one.block is None]
    assert outside == ["transformer.ln_f.weight", "transformer.ln_f.bias"]


def test_blocks_that_stay_and_states_in_files_change_no_bit(tiny, windows, tmp_path):
    model, tunable = opened(tiny("llama"))
    vector = tunable.initial() * 1.01
    expected = gradients(model, tunable, vector, windows(0))
    stayed = gradients(model, tunable, vector, windows(0), stay=True)
    with OpenBlocks(model, stay=False) as blocks:
        spilled = window_gradients(
            model, tunable, vector, list(windows(0)), blocks, HiddenMemory(tmp_path, 1), lambda _: None
        )
    for found in (stayed, spilled):
        for (gradient, loss), (other, other_loss) in zip(expected, found, strict=True):
            assert torch.equal(gradient, other)
            assert loss == other_loss


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", *MIXTURES])
def test_what_the_backward_pass_needs_may_be_kept_and_no_bit_changes(name, tiny, windows, monkeypatch):
    model, tunable = opened(tiny(name))
    vector = tunable.initial() * 1.01
    n_runs = 0
    run = model.run_block

    def counting(*args: object) -> Tensor:
        nonlocal n_runs
        n_runs += 1
        return run(*args)

    monkeypatch.setattr(model, "run_block", counting)
    found, counts = [], []
    for keep in (False, True):
        n_runs = 0
        found.append(gradients(model, tunable, vector, windows(0, 3), stay=True, keep=keep))
        counts.append(n_runs)
    steps = 3 * model.n_blocks
    assert counts == [2 * steps, steps]
    for other in found[1:]:
        for (gradient, loss), (expected, expected_loss) in zip(other, found[0], strict=True):
            assert torch.equal(gradient, expected)
            assert loss == expected_loss


def test_a_block_is_computed_again_only_where_memory_is_short(tiny, windows, monkeypatch, tmp_path):
    model, tunable = opened(tiny("llama"))
    text = HealingText(Participant("p", windows(0, 8)))
    n_runs, found = 0, []
    run = model.run_block

    def counting(*args: object) -> Tensor:
        nonlocal n_runs
        n_runs += 1
        return run(*args)

    monkeypatch.setattr(model, "run_block", counting)
    with OpenBlocks(model, stay=True) as blocks:
        needed = backward_bytes(model, tunable, tunable.initial(), windows(0)[0], blocks)
    of_blocks = 2 * 4 * sum(parameter.numel() for parameter in model.skeleton.parameters())
    counts = []
    # The blocks do not fit; what the backward pass needs does not fit beside them; both fit.
    for limit in (of_blocks - 1, of_blocks + needed - 1, of_blocks + needed):
        limited = CONFIG.model_copy(update={"memory_limit": limit, "check_every": 100})
        with Learner(model, limited, tmp_path / "spilled") as learner:
            for number in (1, 2):
                n_runs = 0
                found.append(learner.contribute([text], tunable.initial(), number)["p"].gradient)
                counts.append(n_runs)
    once = model.n_blocks
    # The memory that is needed is found once, with the first block.
    assert counts == [2 * once, 2 * once, 2 * once + 1, 2 * once, once + 1, once]
    for number, gradient in enumerate(found):
        assert torch.equal(gradient, found[number % 2])  # of the same round


def test_one_block_is_in_memory_at_a_time(tiny, windows, monkeypatch, tmp_path):
    model, tunable = opened(tiny("llama"))
    n_open, most, reads = 0, 0, 0
    block = model.block

    @contextmanager
    def counting(index: int) -> Iterator[object]:
        nonlocal n_open, most, reads
        with block(index) as found:
            n_open, reads = n_open + 1, reads + 1
            most = max(most, n_open)
            yield found
            n_open -= 1

    monkeypatch.setattr(model, "block", counting)
    gradients(model, tunable, tunable.initial(), windows(0, 3))
    assert (most, reads) == (1, 2 * model.n_blocks)
    reads = 0
    gradients(model, tunable, tunable.initial(), windows(0, 3), stay=True)
    assert (most, reads) == (model.n_blocks, model.n_blocks)
    # Also where a round measures nothing, or has nothing to train on.
    text = HealingText(Participant("p", windows(0, 8)))
    for number, n_reads in ((1, 2), (CONFIG.rounds, 1)):
        most = reads = 0
        limited = CONFIG.model_copy(update={"memory_limit": 1})
        with Learner(model, limited, tmp_path / "spilled") as learner:
            learner.contribute([text], tunable.initial(), number)
        assert (most, reads) == (1, n_reads * model.n_blocks)


# Sums ------------------------------------------------------------------------------------------


def trained(folder: Path, spilled: Path, parts: list[Tensor], round_windows: int, rounds: int) -> Tensor:
    """The parameters after some rounds, without held-out windows."""
    config = CONFIG.model_copy(update={"round_windows": round_windows, "rounds": rounds})
    model = BlockwiseModel(resolve_model(folder))
    texts = [HealingText(Participant(f"p{number}", part)) for number, part in enumerate(parts)]
    for text, part in zip(texts, parts, strict=True):
        text.training, text.held_out = part, part[:0]
    with Learner(model, config, spilled) as learner:
        server = HealingServer(learner.tunable.initial(), config)
        while not server.is_finished:
            sums = learner.contribute(texts, server.vector, server.number)
            server.take(sum(sums.values(), start=RoundSums.zeros(learner.tunable.n)))
    return server.result


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_many_participants_train_like_one_with_all_windows(name, tiny, windows, tmp_path):
    rounds, each_round = 2, 24
    pooled = windows(0, rounds * each_round)
    expected = trained(tiny(name), tmp_path / "spilled", [pooled], each_round, rounds)
    assert not torch.equal(expected, opened(tiny(name))[1].initial())
    for n in (3, 8):
        dealt = pooled.view(rounds, n, each_round // n, -1)
        parts = [dealt[:, number].flatten(0, 1) for number in range(n)]
        assert torch.equal(
            expected, trained(tiny(name), tmp_path / "spilled", parts, each_round // n, rounds)
        )


def test_sums_are_exact_whatever_the_order():
    generator = torch.Generator().manual_seed(0)
    added = [torch.randn(50, generator=generator) * 10.0**power for power in (-6, -3, 0, 3, 6)]
    forward, backward = RoundSums.zeros(50), RoundSums.zeros(50)
    for number, gradient in enumerate(added):
        forward.add_window(gradient, number + 0.3, 15)
    for number, gradient in reversed(list(enumerate(added))):
        part = RoundSums.zeros(50)
        part.add_window(gradient, number + 0.3, 15)
        backward = part + backward
    assert torch.equal(forward.words, backward.words)
    exact = sum(gradient.double() for gradient in added) / 75
    assert torch.allclose(forward.gradient, exact, atol=2**-24)
    assert forward.loss == pytest.approx((0 + 1 + 2 + 3 + 4 + 5 * 0.3) / 75, abs=2**-20)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**24])
def test_a_gradient_or_loss_that_is_no_number_is_refused(bad):
    sums = RoundSums.zeros(3)
    with pytest.raises(UpdateError, match=r"a gradient holds NaN or a number of 1\.68e\+07 or more"):
        sums.add_window(torch.tensor([0.0, bad, 1.0]), 1.0, 15)
    with pytest.raises(UpdateError, match="the loss of a window is"):
        sums.add_window(torch.zeros(3), -1.0, 15)


def of(gradient: Tensor) -> RoundSums:
    sums = RoundSums.zeros(len(gradient))
    sums.add_window(gradient, 1.0, 10)
    return sums


def test_a_gradient_out_of_proportion_is_refused_and_named():
    honest = {f"p{number}": of(torch.full((4,), 1.0 + number)) for number in range(4)}
    assert outstanding_gradients(honest) == {}
    honest["p2"] = of(torch.full((4,), 1000.0))
    assert outstanding_gradients(honest).keys() == {"p2"}
    assert "as long as the other participants' median" in outstanding_gradients(honest)["p2"]
    assert outstanding_gradients({name: honest[name] for name in ("p0", "p2")}) == {}


@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0, 1e6])
def test_a_long_gradient_is_shortened_and_none_counts_for_more(factor):
    gradient = torch.randn(500, generator=torch.Generator().manual_seed(1))
    gradient *= factor * 10 / gradient.norm()
    sums = RoundSums.zeros(500)
    sums.add_window(gradient, 1.0, 10, max_norm=1.0)
    assert float(sums.gradient.norm()) == pytest.approx(min(factor, 1.0), rel=1e-4)
    assert torch.nn.functional.cosine_similarity(
        sums.gradient, gradient.double(), dim=0
    ).item() == pytest.approx(1.0, abs=1e-6)
    assert not sums.exceeds(1, 1.0)
    assert (sums + sums).exceeds(1, 1.0) is False  # twice the tokens
    longer = RoundSums(sums.words.clone())
    longer.words[:-4] *= 2
    assert longer.exceeds(1, 1.0) == (factor > 0.5)


# Towards the dense model -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_distance_to_the_dense_model_and_its_gradient_are_autograds(name, tiny, windows, tmp_path):
    pruned = prune(tiny(name), [windows(0)], out=tmp_path / "run").model_dir
    model, tunable = opened(pruned)
    dense = BlockwiseModel(resolve_model(tiny(name)))
    window = windows(0)[0]
    with OpenBlocks(model, stay=False) as blocks, OpenBlocks(dense, stay=False) as dense_blocks:
        ((gradient, loss),) = window_gradients(
            model,
            tunable,
            tunable.initial(),
            [window],
            blocks,
            HiddenMemory(),
            lambda _: None,
            DenseDistance(dense, dense_blocks),
        )
    whole = Whole(pruned).model
    parameters = {key: value.requires_grad_() for key, value in whole.named_parameters()}
    with torch.no_grad():
        expected = torch.log_softmax(Whole(tiny(name)).model(window[None]).logits[0, :-1], -1)
    found = torch.log_softmax(whole(window[None]).logits[0, :-1], -1)
    distance = (expected.exp() * (expected - found)).sum()
    distance.backward()
    assert loss == pytest.approx(float(distance.detach()), rel=1e-4)
    for one in tunable.slices:
        wanted = parameters[one.name].grad
        if one.linear is not None:
            wanted = (one.linear.stored(wanted) * one.linear.stored(parameters[one.name].detach())).sum(1)
        got = gradient[one.start : one.start + one.n]
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), one.name


def test_the_dense_model_is_at_no_distance_from_itself(tiny, windows, tmp_path):
    config = CONFIG.model_copy(update={"loss": "dense"})
    members = [windows(0, 8), windows(1, 8)]
    result = heal(tiny("llama"), members, config, out=tmp_path / "healed", dense=tiny("llama"))
    assert dict(result.record.held_out)[0] == pytest.approx(0, abs=1e-5)
    assert result.record.dense.source == str(tiny("llama"))


def test_a_dense_model_that_cannot_be_compared_is_refused(tiny, windows, tmp_path, small_model):
    towards = CONFIG.model_copy(update={"loss": "dense"})
    for config, dense, message in (
        (towards, None, "none is named"),
        (CONFIG, tiny("llama"), "loss text does not compare with it"),
        (towards, small_model, "name the model that it was pruned from"),
    ):
        with pytest.raises((ConfigError, ModelError), match=message):
            heal(tiny("llama"), [windows(0, 8)], config, out=tmp_path / "healed", dense=dense)
    assert not (tmp_path / "healed").exists()


# The result ------------------------------------------------------------------------------------


@pytest.fixture
def pruned(tiny, windows, tmp_path) -> Path:
    return prune(tiny("llama"), [windows(0), windows(1)], out=tmp_path / "pruned").model_dir


def test_a_healed_model_has_the_form_of_its_source_and_computes_what_was_trained(pruned, windows, tmp_path):
    result = heal(pruned, [windows(0, 8), windows(1, 8)], CONFIG, out=tmp_path / "healed")
    before, after = weights_of(pruned), weights_of(result.model_dir)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.norm.weight" in changed
    assert "model.embed_tokens.weight" not in changed
    for name, tensor in before.items():
        assert (tensor.shape, tensor.dtype) == (after[name].shape, after[name].dtype)
        if tensor.ndim == 2:
            assert torch.equal(tensor == 0, after[name] == 0)
            assert not torch.signbit(after[name][tensor == 0]).any(), "a pruned weight became -0.0"
    held_out = torch.cat([windows(0, 8)[-1:], windows(1, 8)[-1:]])
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(
            model(held_out).logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()
        )
    best = dict(result.record.held_out)[result.record.best_round]
    assert float(nll) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-oss"])
def test_biases_and_transposed_weights_are_folded_as_they_were_trained(name, tiny, windows, tmp_path):
    config = CONFIG.model_copy(update={"learning_rate": 0.05})
    model, tunable = opened(tiny(name))
    texts = [HealingText(Participant("p", windows(0, 8)))]
    with Learner(model, config, tmp_path / "spilled") as learner:
        server = HealingServer(tunable.initial(), config)
        server.take(learner.contribute(texts, server.vector, 0)["p"])
        vector = server.vector.clone()
    expected = losses(model, tunable, vector, windows(3))
    from fedprllm.healing.result import write_healed

    write_healed(tmp_path / "model", model, tunable, vector)
    folded, again = opened(tmp_path / "model")
    assert losses(folded, again, again.initial(), windows(3)) == pytest.approx(expected, rel=1e-5)
    assert losses(model, tunable, tunable.initial(), windows(3)) != pytest.approx(expected, rel=1e-4)


def test_under_masks_the_bits_are_the_same_and_only_sums_are_recorded(pruned, windows, tmp_path):
    participants = [windows(number, 8) for number in range(3)]
    clear = heal(pruned, participants, CONFIG, out=tmp_path / "clear")
    secure = CONFIG.model_copy(update={"secure": True})
    masked = heal(pruned, participants, secure, out=tmp_path / "masked")
    assert_same_bits(clear.model_dir, masked.model_dir)
    assert [one.loss for one in clear.record.rounds] == [one.loss for one in masked.record.rounds]
    assert not any(one.losses for one in masked.record.rounds)
    with pytest.raises(SecureError, match="3"):
        heal(pruned, participants[:2], secure, out=tmp_path / "two")


def test_a_killed_healing_continues_and_ends_with_the_same_bits(pruned, windows, tmp_path):
    participants = [windows(0, 8), windows(1, 8)]
    whole = heal(pruned, participants, CONFIG, out=tmp_path / "whole")

    class Killed(Exception):
        pass

    @contextmanager
    def killing(description: str, total: int):
        done = 0

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            if description == "healing" and done > total // 2:
                raise Killed

        yield advance

    for _ in range(2):
        with pytest.raises(Killed):
            heal(pruned, participants, CONFIG, out=tmp_path / "killed", progress=killing)
    assert len(list((tmp_path / "killed" / "rounds").iterdir())) >= 2
    result = heal(pruned, participants, CONFIG, out=tmp_path / "killed")
    assert_same_bits(whole.model_dir, result.model_dir)
    assert [one.loss for one in result.record.rounds] == [one.loss for one in whole.record.rounds]
    assert heal(pruned, participants, CONFIG, out=tmp_path / "killed").record == result.record


def test_a_damaged_state_is_noticed_and_computed_again(pruned, windows, tmp_path):
    whole = heal(pruned, [windows(0, 8)], CONFIG, out=tmp_path / "whole")
    out = tmp_path / "damaged"
    heal(pruned, [windows(0, 8)], CONFIG, out=out)
    (out / "result.json").unlink()
    number = CONFIG.rounds
    state = {name: tensor + 1 for name, tensor in load_file_of(whole.out, out, number).items()}
    from safetensors.torch import save_file

    (out / "state").mkdir(exist_ok=True)
    save_file(state, out / "state" / f"round-{number:04d}.safetensors")
    with pytest.warns(FedprllmWarning, match="healing begins again at round 0"):
        result = heal(pruned, [windows(0, 8)], CONFIG, out=out)
    assert_same_bits(whole.model_dir, result.model_dir)


def load_file_of(whole: Path, out: Path, number: int) -> dict[str, Tensor]:
    """Some tensors: the state itself is deleted with the result."""
    assert not (out / "state").exists()
    return load_file(next((whole / "model").glob("*-00001-*.safetensors")))


@pytest.fixture(scope="module")
def damaged(small_model, tmp_path_factory) -> Path:
    """The trained small model with half of its weights gone."""
    config = PruneConfig(criterion="magnitude", sparsity=0.7, windows=1, window_length=64)
    texts = [Documents([library_text("prose")[:20_000]])]
    return prune(small_model, texts, config, out=tmp_path_factory.mktemp("damaged") / "run").model_dir


TEXTS = {kind: Documents([library_text(kind)[:40_000]]) for kind in KINDS}
HEALING = HealConfig(rounds=12, check_every=4, windows=24, window_length=64, learning_rate=0.02)


def test_healing_lowers_the_loss_on_text_that_nobody_trained_on(damaged, tmp_path):
    tests = {kind: Documents([library_text(kind, held_out=True)[:20_000]]) for kind in KINDS}
    result = heal(damaged, TEXTS, HEALING, out=tmp_path / "healed", eval_texts=tests)
    before, healed = (
        sum(row.nll for row in result.evaluation[name]) / len(tests) for name in ("before", "healed")
    )
    assert healed < before - 0.1
    assert result.record.best_round == 12
    assert result.record.notes == []


def test_where_the_held_out_loss_rises_the_parameters_are_taken_back(damaged, tmp_path):
    config = HEALING.model_copy(update={"learning_rate": 1.0})
    result = heal(damaged, TEXTS, config, out=tmp_path / "healed")
    measured = dict(result.record.held_out)
    assert max(measured.values()) > measured[0] * 1.01
    assert any(one.taken_back for one in result.record.rounds)
    assert measured[result.record.best_round] == min(measured.values())
    assert any("rose" in note or "never fell" in note for note in result.record.notes)


def test_a_participant_with_one_window_holds_none_out_and_is_told(pruned, windows, tmp_path):
    result = heal(pruned, [windows(0, 1)], CONFIG, out=tmp_path / "healed")
    assert result.record.held_out == []
    assert "no window was held out" in result.record.notes[-1]


def test_pruned_smaller_models_and_patterns_are_healed(tiny, windows, tmp_path):
    for number, options in enumerate(({"structure": "mlp=0.3"}, {"pattern": "2:4"}, {"share": "gram"})):
        run = prune(
            tiny("llama"), [windows(0), windows(1)], PruneConfig(**options), out=tmp_path / f"run{number}"
        )
        result = heal(run.model_dir, [windows(0, 8)], CONFIG, out=tmp_path / f"healed{number}")
        shapes = [
            {name: tensor.shape for name, tensor in weights_of(folder).items()}
            for folder in (run.model_dir, result.model_dir)
        ]
        assert shapes[0] == shapes[1]
        AutoModelForCausalLM.from_pretrained(result.model_dir)


# Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds: input should be greater than or equal to 1, found 0"),
        ({"learning_rate": 0}, "learning_rate: input should be greater than 0"),
        ({"bos": "evry"}, "unknown value of bos: 'evry'"),
        ({"round": 3}, "unknown option 'round'"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        HealConfig(**options)


def test_another_configuration_is_refused(pruned, windows, tmp_path):
    with pytest.raises(ConfigError, match="config must be a HealConfig, found PruneConfig"):
        heal(pruned, [windows(0)], PruneConfig(), out=tmp_path / "healed")
