"""Pruning under masks gives the same bits as pruning in the clear, for every way of sharing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedprllm import ConfigError, PruneConfig, UpdateError, prune
from fedprllm.deciding import DECISIONS
from fedprllm.errors import SecureError
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning import secure_sums as module
from fedprllm.pruning.method import pruning_method, survey_method
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.walk import Walker
from fedprllm.secure.participant import SecureParticipant
from fedprllm.sharing import SHARING
from fedprllm.sharing.as_words import Layout, masked_bytes
from tests.contracts.test_walk import assert_same_bits

SHARES = list(DECISIONS)
STRUCTURES = {
    "channels": "mlp=0.25",
    "heads": "heads=2",
    "parts": "mlp=0.25,heads=2",
    "influence": "depth=1",
    "experts": "experts=2",
}


def people(windows, n: int = 3) -> dict[str, torch.Tensor]:
    return {f"p{index}": windows(index, 1 + index % 3) for index in range(n)}


def both(tiny, tmp_path, participants, **options):
    """The same run in the clear and under masks."""
    runs = [
        prune(tiny, participants, PruneConfig(secure=secure, **options), out=tmp_path / str(secure))
        for secure in (False, True)
    ]
    assert_same_bits(runs[0].model_dir, runs[1].model_dir)
    return runs


@pytest.mark.parametrize(
    ("share", "strategy"),
    [
        (share, strategy)
        for share in SHARES
        for strategy in ("one-shot", "iterative")
        if (share, strategy) != ("experts", "iterative")
    ],
)
def test_secure_is_plain_in_every_bit(tiny, windows, tmp_path, share, strategy) -> None:
    structure = STRUCTURES.get(share)
    options = {"share": share, "strategy": strategy} | ({"structure": structure} if structure else {})
    plain, secure = both(
        tiny("qwen3-moe" if share == "experts" else "llama"), tmp_path, people(windows), **options
    )
    for name in plain.votes if share == "mask" else ():
        assert torch.equal(plain.votes[name], secure.votes[name])
    for ours, theirs in zip(plain.record.blocks, secure.record.blocks, strict=True):
        assert {n: (one.n_zeros, one.n_ties, one.vote_histogram) for n, one in ours.linears.items()} == {
            n: (one.n_zeros, one.n_ties, one.vote_histogram) for n, one in theirs.linears.items()
        }
        assert theirs.participants == ["p0", "p1", "p2"]


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": "owl"},
        {"allocation": "owl", "share": "statistics"},
        {"allocation": "owl", "share": "gram"},
        {"weighting": "tokens", "scale_weights": True, "windows": 8},
        {"pattern": "2:4"},
        {"local_group": "column", "server_group": "row", "sparsity": 0.3, "server_ties": "random"},
        {"criterion": "magnitude"},
        {"criterion": "ria", "local_group": "layer"},
        {"share": "gram", "solver": "sparsegpt"},
    ],
    ids=str,
)
def test_options_change_nothing_about_it(tiny, windows, tmp_path, options) -> None:
    plain, secure = both(tiny("gpt2"), tmp_path, people(windows, 5), **options)
    assert plain.record.outlier_ratios == secure.record.outlier_ratios


def test_blocks_that_only_some_prune(tiny, windows, tmp_path) -> None:
    """With 6 participants, of which one may collude, 4 are enough."""
    options = {"block_fraction": "1,p0=0.34,p1=0.34"}
    _, secure = both(tiny("llama"), tmp_path, people(windows, 6), **options)
    assert {len(block.participants or []) for block in secure.record.blocks} <= {4, 5, 6}
    assert sum(len(block.participants or []) for block in secure.record.blocks) == 4 * 3 + 2


@pytest.mark.parametrize(
    ("n", "fraction", "words"),
    [
        (2, "1", "2 participants, of which 1 may conspire with the server: expected at least 3"),
        (1, "1", "expected at least 3"),
        (4, "0.5", r"would be a sum of \d updates, and this participant requires at least 3 of 4"),
    ],
)
def test_a_sum_over_too_few_is_refused_before_anything_is_computed(
    tiny, windows, tmp_path, n: int, fraction: str, words: str
) -> None:
    config = PruneConfig(secure=True, block_fraction=fraction)
    with pytest.raises(SecureError, match=words):
        prune(tiny("llama"), people(windows, n), config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "centralized"},
        {"strategy": "local-only"},
        {"share": "statistics", "aggregation": "trimmed"},
        {"weighting": "tokens", "windows": 0},
    ],
)
def test_options_that_need_each_update_are_refused(options) -> None:
    with pytest.raises(ConfigError, match="secure"):
        PruneConfig(secure=True, **options)


def test_the_result_says_how_large_updates_under_masks_are(tiny, windows, tmp_path) -> None:
    plain, secure = both(tiny("llama"), tmp_path, people(windows))
    n_weights = sum(linear.n_weights for linear in BlockwiseModel(tiny("llama")).linears[0].values())
    assert plain.record.update_bytes_per_block[0] == n_weights // 8
    # Two bits for up to 3 votes; the words of each of 7 Linears are full, and one word holds the windows.
    assert secure.record.update_bytes_per_block[0] == 2 * n_weights // 8 + 8
    limit = PruneConfig(secure=True, max_update_mb=1.5 * n_weights / 8 / 1e6)
    with pytest.raises(ConfigError, match="but max_update_mb allows"):
        prune(tiny("llama"), people(windows), limit, out=tmp_path / "limited")


def test_what_the_server_adds_up_is_masked(tiny, windows, tmp_path, monkeypatch) -> None:
    """Nothing that goes to the server equals, or is statistically like, what a participant made."""
    plain, sent = [], []
    pack, mask = Layout.pack, SecureParticipant.mask

    def packed(self, update, n_tokens):
        plain.append(pack(self, update, n_tokens))
        return plain[-1]

    def masked(self, name, words):
        sent.append(mask(self, name, words))
        return sent[-1].copy()

    monkeypatch.setattr(Layout, "pack", packed)
    monkeypatch.setattr(SecureParticipant, "mask", masked)
    prune(tiny("llama"), people(windows), PruneConfig(secure=True), out=tmp_path / "run")
    assert len(sent) == len(plain) == 3 * 3
    for ours, theirs in zip(plain, sent, strict=True):
        assert not (ours == theirs).any()
        ones = np.unpackbits(theirs.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 6 * 0.5 / (64 * len(theirs)) ** 0.5


@pytest.mark.parametrize("kind", [kind for kind in SHARING if kind not in STRUCTURES or kind == "experts"])
@pytest.mark.parametrize("n", [3, 8, 64])
def test_sums_of_words_are_words_of_the_sums(tiny, windows, kind, n) -> None:
    """The layout alone, for as many participants as a federation may have."""
    how = {"structure": STRUCTURES[kind]} if kind in STRUCTURES else {"allocation": "owl"}
    config = PruneConfig(share="mask" if kind == "outliers" else kind, window_length=16, **how)
    method = survey_method(config) if kind == "outliers" else pruning_method(config)
    model = BlockwiseModel(tiny("qwen3-moe" if kind == "experts" else "llama"))
    with model.block(0) as block:
        updates = []
        for index in range(min(n, 4)):
            participant = Participant(f"p{index}", windows(index, 1 + index))
            participant.enter(model)
            update = Walker(participant, method, model.n_blocks).contribute(block).update
            assert update is not None
            updates.append((update, participant.n_tokens))
        updates = [updates[index % len(updates)] for index in range(n)]
        plain, layout = method.empty(block), Layout(method.empty(block), n, 16)
        for update, n_tokens in updates:
            plain.add(update, n_tokens)
        words = np.add.reduce([layout.pack(*one) for one in updates], dtype=np.uint64)
        assert 8 * len(words) == 8 * layout.n_words == masked_bytes(method.sharing, block.linears, n)
        found = layout.unpack(words, n)
    for field in ("n_participants", "n_tokens", "weight"):
        assert getattr(found, field) == getattr(plain, field)
    assert found.votes.keys() == plain.votes.keys()
    for name, votes in plain.votes.items():
        assert torch.equal(votes.counts(), found.votes[name].counts())
        assert votes.total == found.votes[name].total
    assert set(found.sums) == set(plain.sums)
    for name, total in plain.sums.items():
        assert torch.equal(total, found.sums[name])


# A line for every way of sharing: how a hostile participant spoils its update, and what is said of the sum.
HOSTILE = {
    "mask": (torch.ones_like, "the votes on .* in comparison group 0 .* expected exactly"),
    "statistics": (lambda t: 1e13 * torch.ones_like(t), "expected at most .* for any text"),
    "gram": (lambda t: -t, "has a negative number on its diagonal|negative eigenvalue"),
    "weights": (torch.ones_like, "the votes on .* in comparison group 0 .* expected exactly"),
}


@pytest.mark.parametrize("share", HOSTILE)
def test_a_sum_that_honest_participants_cannot_add_up_to_ends_the_run(
    tiny, windows, tmp_path, monkeypatch, share
) -> None:
    row, (spoil, words), n_calls = SHARING[share], HOSTILE[share], 0

    def contribute(seen, target):
        nonlocal n_calls
        n_calls += 1
        update = row.contribute(seen, target)
        return {name: spoil(tensor) for name, tensor in update.items()} if n_calls == 2 else update

    monkeypatch.setitem(SHARING, share, replace(row, contribute=contribute))
    with pytest.raises(UpdateError, match=f"block 0: the sum over 3 participants cannot come.*({words})"):
        prune(tiny("llama"), people(windows), PruneConfig(share=share, secure=True), out=tmp_path / "run")


def test_a_run_under_masks_continues_where_it_was_killed(tiny, windows, tmp_path, monkeypatch) -> None:
    config = PruneConfig(secure=True, strategy="iterative")
    whole = prune(tiny("llama"), people(windows), config, out=tmp_path / "whole")
    totals, n_calls = module.SecureSums.totals, 0

    def killed(self, block, method):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise KeyboardInterrupt
        return totals(self, block, method)

    monkeypatch.setattr(module.SecureSums, "totals", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tiny("llama"), people(windows), config, out=tmp_path / "run")
    monkeypatch.setattr(module.SecureSums, "totals", totals)
    again = prune(tiny("llama"), people(windows), config, out=tmp_path / "run")
    assert_same_bits(whole.model_dir, again.model_dir)


def test_a_participant_gives_no_masked_update_twice_once_the_sum_is_known(tiny, windows) -> None:
    sums = module.SecureSums({f"p{i}": [0] for i in range(3)}, 1, PruneConfig(secure=True), survey=False)
    one = sums.parties.participants["p0"]
    one.mask("block 0000", np.zeros(4, np.uint64))
    one.settle("block 0000")
    with pytest.raises(SecureError, match="asked a second time"):
        one.mask("block 0000", np.zeros(4, np.uint64))


def test_the_example_of_the_specification() -> None:
    from fedprllm.core.bitplanes import PackedVotes
    from fedprllm.sharing.interface import Totals

    layout = Layout(Totals(votes={"w": PackedVotes(3)}), 4, 16)
    words = layout.pack({"w": torch.tensor([[True, False, True]])}, 2 * 16)
    assert words.tolist() == [2, 65]


@pytest.mark.parametrize("share", ["mask", "statistics", "gram"])
def test_a_mixture_of_experts(tiny, windows, tmp_path, share) -> None:
    both(tiny("mixtral"), tmp_path, people(windows), share=share)
