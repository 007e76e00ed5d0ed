"""What a hostile participant adds to a sum under masks, where only the sum is checked.

Nobody sees its words, so they need not be those of an update: a count may be any number, also below zero, as
long as the sum is one that honest participants could have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks._attacks import ATTACKS, Scene, profiles, unfolded
from fedprllm.secure.words import Words, n_words
from fedprllm.sharing.as_words import Layout
from fedprllm.sharing.gram_matrices import PRODUCTS
from fedprllm.sharing.outlier_counts import n_weights

__all__ = ["MASKED_ATTACKS", "MaskedAttack", "MaskedScene"]

_JUST_UNDER = 0.999
_UNLIMITED = 1e6  # times the others' total, where no normalization limits an input


@dataclass(frozen=True)
class MaskedScene:
    """What an attacker knows when it makes its words of a block.

    Attributes:
        scene: The same as without masks.
        layout: Where the parts of an update are in its words.
        scores: Its own scores of the weights, [out, in] by name.
    """

    scene: Scene
    layout: Layout
    scores: Mapping[str, Tensor]

    @property
    def n(self) -> int:
        """Number of participants."""
        return 1 + len(self.scene.others)


MaskedAttack = Callable[[MaskedScene], Words]


def _honestly_packed(name: str, kind: str) -> MaskedAttack:
    """An update of `ATTACKS`, masked like an honest one."""

    def attack(masked: MaskedScene) -> Words:
        return masked.layout.pack(ATTACKS[kind][name](masked.scene), masked.scene.n_tokens)

    return attack


# ---- votes -------------------------------------------------------------------------------------------


def _votes(choose: Callable[[MaskedScene, str, Tensor], Tensor]) -> MaskedAttack:
    """Words of counts that are chosen for each Linear, given its groups of scores, [groups, n]."""

    def attack(masked: MaskedScene) -> Words:
        scene, bits = masked.scene, masked.n.bit_length()
        parts = [np.array([scene.n_tokens // masked.layout.window_length], np.uint64)]
        for name in masked.layout.names:
            grouping = scene.target.local_grouping(scene.linears[name])
            counts = torch.zeros(scene.linears[name].shape, dtype=torch.int64)
            grouping.split(counts).copy_(choose(masked, name, grouping.split(masked.scores[name])))
            parts.append(_packed(counts.reshape(-1).numpy(), bits))
        return np.concatenate(parts)

    return attack


def _packed(counts: np.ndarray, bits: int) -> Words:
    """Pack counts of any sign modulo 2^64."""
    words = np.zeros(n_words(len(counts), bits), np.uint64)
    for place in range(64 // bits):
        part = counts[place * len(words) : (place + 1) * len(words)]
        words[: len(part)] += part.astype(np.int64).view(np.uint64) << np.uint64(place * bits)
    return words


def _groups(masked: MaskedScene, name: str, mask: Tensor) -> Tensor:
    return masked.scene.target.local_grouping(masked.scene.linears[name]).split(mask.to(torch.int64))


def _doubled(masked: MaskedScene, name: str, scores: Tensor) -> Tensor:  # noqa: ARG001
    return 2 * _groups(masked, name, masked.scene.own[name])


def _exchanged(share: float) -> Callable[[MaskedScene, str, Tensor], Tensor]:
    """Turn the votes around where its own text leaves least doubt of the others' votes.

    All votes for the weights with its lowest scores go to those with its highest.
    """

    def choose(masked: MaskedScene, name: str, scores: Tensor) -> Tensor:
        counts, order = _groups(masked, name, masked.scene.own[name]).clone(), scores.argsort(dim=1)
        n = max(1, int(share * int(counts[0].sum())))
        counts.scatter_add_(1, order[:, :n], torch.full_like(order[:, :n], -masked.n))
        return counts.scatter_add_(1, order[:, -n:], torch.full_like(order[:, :n], masked.n))

    return choose


def _exchanged_in_few(share: float) -> Callable[[MaskedScene, str, Tensor], Tensor]:
    """The same for one pair of weights in those groups where the two differ most from the rest."""

    def choose(masked: MaskedScene, name: str, scores: Tensor) -> Tensor:
        counts, middle = _groups(masked, name, masked.scene.own[name]).clone(), scores.median(dim=1).values
        low, high = scores.min(dim=1), scores.max(dim=1)
        doubt = middle / high.values + low.values / middle
        chosen = doubt.argsort()[: max(1, int(share * len(doubt)))]
        counts[chosen, low.indices[chosen]] -= masked.n
        counts[chosen, high.indices[chosen]] += masked.n
        return counts

    return choose


def _opposite(masked: MaskedScene, name: str, scores: Tensor) -> Tensor:
    """All votes for the weights with the fewest, given everybody's votes."""
    others = sum(_groups(masked, name, update[name]) for update, _ in masked.scene.others)
    assert isinstance(others, Tensor)
    k = int(_groups(masked, name, masked.scene.own[name])[0].sum())
    worst = (others * scores.max() * 2 - scores).argsort(dim=1)[:, :k]
    return torch.zeros_like(others).scatter_(1, worst, masked.n) - others


# ---- sums --------------------------------------------------------------------------------------------


def _sums(profile: Callable[[Scene, Tensor], Tensor]) -> MaskedAttack:
    """Sums of a given profile, as large as the model's normalizations allow for the total."""

    def attack(masked: MaskedScene) -> Words:
        is_gram = masked.scene.target.config.share == "gram"
        scene, update = unfolded(masked.scene) if is_gram else masked.scene, {}
        n_tokens = scene.n_tokens + sum(tokens for _, tokens in scene.others)
        for source in masked.layout.names:
            others = [sums[source].to(torch.float64) for sums, _ in scene.others]
            total = torch.stack([one.diagonal() if is_gram else one for one in others]).sum(dim=0)
            wanted = profile(scene, scene.usual(source).median(dim=0).values).to(torch.float64)
            size = _UNLIMITED * float(total.sum() / wanted.sum())
            if (norm := scene.norms.get(source)) is not None:
                left = _JUST_UNDER * norm.most_energy - norm.energy(total / n_tokens)
                size = left * n_tokens / norm.energy(wanted)
            if is_gram:  # what its own words have room for
                size = min(
                    size, _JUST_UNDER * 2.0 ** (62 - PRODUCTS.fraction_bits) / masked.n / float(wanted.max())
                )
            sums = (wanted * size).to(torch.float32)
            update[source] = torch.diag(sums) if is_gram else sums
        return masked.layout.pack(scene.fold(update), scene.n_tokens)

    return attack


def _count(total: Callable[[int], int]) -> MaskedAttack:
    """Outliers such that the total is the most there can be in odd blocks, and none in even ones."""

    def attack(masked: MaskedScene) -> Words:
        scene = masked.scene
        most = masked.n * int(n_weights(scene.linears) / scene.target.config.owl_m)
        others = sum(int(update["outliers"][0]) for update, _ in scene.others)
        wanted = total(most) if scene.seed % 2 else 0
        return masked.layout.pack({"outliers": torch.tensor([wanted - others])}, scene.n_tokens)

    return attack


_SUMS: dict[str, MaskedAttack] = {
    f"{name}, as large as the model allows": _sums(profile) for name, profile in profiles().items()
}
MASKED_ATTACKS: dict[str, dict[str, MaskedAttack]] = {
    "mask": {
        "inverted mask": _honestly_packed("inverted mask", "mask"),
        "prunes everything": _honestly_packed("prunes everything", "mask"),
        "its own mask, twice": _votes(_doubled),
        **{
            f"votes exchanged for the surest {share:.0%}, from its own text": _votes(_exchanged(share))
            for share in (0.5, 0.2, 0.05, 0.01)
        },
        **{
            f"one vote exchanged in the surest {share:.0%} of groups": _votes(_exchanged_in_few(share))
            for share in (0.1, 0.01)
        },
        "votes turned around, with knowledge of all votes": _votes(_opposite),
    },
    "statistics": {**_SUMS, "100 times the others": _honestly_packed("100 times the others", "statistics")},
    "gram": {**_SUMS, "negative eigenvalue": _honestly_packed("negative eigenvalue", "gram")},
    "outliers": {
        "1e9": _honestly_packed("1e9", "outliers"),
        "as many as can be in total, or none": _count(lambda most: most),
    },
}
