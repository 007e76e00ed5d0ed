"""What a hostile participant sends instead of its update, by what it shares.

An attacker knows everything: the model, the bounds, and what all others send.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedprllm.models.norms import InputNorm
from fedprllm.sharing import Target
from fedprllm.sharing.bounds import FACTOR
from fedprllm.sharing.gram_matrices import PRODUCTS, square, triangle
from fedprllm.sharing.interface import Linears, Norms, Tensors
from fedprllm.sharing.outlier_counts import n_weights
from fedprllm.sharing.pruned_weights import mask_name

__all__ = ["ATTACKS", "Attack", "Scene", "profiles", "unfolded"]

_JUST_UNDER = 0.999


@dataclass(frozen=True)
class Scene:
    """What an attacker knows when it makes its update of a block.

    Attributes:
        linears: The Linears of the block.
        own: Its honest update.
        others: The honest updates of the others, with their numbers of tokens.
        n_tokens: Its number of tokens.
        weights: The model's own weights of the block, [out, in] by name.
        norms: Normalizations of the block's inputs.
        target: What the run prunes.
        seed: Seed of its random numbers.
    """

    linears: Linears
    own: Tensors
    others: list[tuple[Tensors, int]]
    n_tokens: int
    weights: Mapping[str, Tensor]
    norms: Norms
    target: Target
    seed: int

    def generator(self) -> torch.Generator:
        """Random numbers, the same for the same scene."""
        return torch.Generator().manual_seed(self.seed)

    def usual(self, source: str) -> Tensor:
        """Each other's sums of squares per token of an input, [others, in]."""
        rows = [update[source] / n_tokens for update, n_tokens in self.others]
        return torch.stack([row.diagonal() if row.ndim == 2 else row for row in rows]).to(torch.float64)

    def fold(self, update: Tensors) -> Tensors:
        """Gram matrices [in, in] as the upper triangles that are shared; other tensors stay as they are."""
        return {
            source: PRODUCTS.rounded(triangle(matrix)) if matrix.ndim == 2 else matrix
            for source, matrix in update.items()
        }


Attack = Callable[[Scene], Tensors]

# ---- masks -------------------------------------------------------------------------------------------


def _masks(choose: Callable[[Scene, Tensor], Tensor]) -> Attack:
    """The mask that prunes the highest values of ``choose(scene, honest mask)`` in every local group."""

    def attack(scene: Scene) -> Tensors:
        update = dict(scene.own)
        for name, linear in scene.linears.items():
            key = mask_name(name) if mask_name(name) in update else name
            grouping = scene.target.local_grouping(linear)
            values = choose(scene, update[key]).to(torch.float32)
            mask = torch.zeros(linear.shape, dtype=torch.bool)
            rows = grouping.split(mask)
            n_pruned = grouping.n_pruned(linear.shape)
            rows.scatter_(1, grouping.split(values).argsort(dim=1, descending=True)[:, :n_pruned], True)
            update[key] = mask
            if key != name:
                update[name] = torch.where(mask, 0.0, scene.weights[name])
        return update

    return attack


def _inverted(scene: Scene, mask: Tensor) -> Tensor:  # noqa: ARG001
    return ~mask


def _random(scene: Scene, mask: Tensor) -> Tensor:
    return torch.rand(mask.shape, generator=scene.generator())


def _same_columns(scene: Scene, mask: Tensor) -> Tensor:  # noqa: ARG001
    """Prune the input channels that the honest mask keeps most."""
    return (~mask).sum(dim=0, keepdim=True).expand(mask.shape)


# ---- sums --------------------------------------------------------------------------------------------


def _sums(profile: Callable[[Scene, Tensor], Tensor], limit: str = "bound") -> Attack:
    """Sums of squares of a given profile, made as large as the bounds allow.

    Args:
        profile: Returns relative sums of squares, [in], given the others' median.
        limit: ``bound`` for the largest that passes, or a total in units of the others' median.
    """

    def attack(scene: Scene) -> Tensors:
        update = {}
        for source, own in scene.own.items():
            usual = scene.usual(source)
            wanted = profile(scene, usual.median(dim=0).values).to(torch.float64)
            size = (
                _largest(wanted, usual, scene.norms.get(source))
                if limit == "bound"
                else float(limit) * float(usual.sum(dim=1).median() / wanted.sum())
            )
            sums = (wanted * size * scene.n_tokens).clamp(max=3e38).to(torch.float32)
            update[source] = torch.diag(sums) if own.ndim == 2 else sums
        return update

    return attack


def _largest(wanted: Tensor, usual: Tensor, norm: InputNorm | None) -> float:
    """The factor with which a profile passes all bounds by a thousandth."""
    total = usual.sum(dim=1).median()
    floor = 0.1 * total / len(wanted)
    sizes = [
        FACTOR * float(total / wanted.sum()),
        FACTOR / float((wanted / (usual.median(dim=0).values + floor)).mean()),
    ]
    if norm is not None:
        sizes.append(norm.most_energy / norm.energy(wanted))
    return _JUST_UNDER * min(sizes)


def _half(scene: Scene, median: Tensor) -> Tensor:  # noqa: ARG001
    """The half of the channels that matters least to the others, and nothing in the rest."""
    return (median <= median.median()).to(torch.float64)


def _half_in_proportion(scene: Scene, median: Tensor) -> Tensor:
    return _half(scene, median) * (median + 1e-3 * median.mean())


def _upside_down(scene: Scene, median: Tensor) -> Tensor:  # noqa: ARG001
    return 1 / (median + 1e-3 * median.mean())


def _noise(scene: Scene, median: Tensor) -> Tensor:
    return torch.randn(median.shape, generator=scene.generator()).square()


def _as_the_others(scene: Scene, median: Tensor) -> Tensor:  # noqa: ARG001
    return median + 1e-9


def profiles() -> dict[str, Callable[[Scene, Tensor], Tensor]]:
    """Relative sums of squares, [in], given the others' median."""
    return {
        "half of the channels": _half,
        "half of the channels in proportion": _half_in_proportion,
        "upside down": _upside_down,
    }


def _zeros(scene: Scene) -> Tensors:
    return {source: torch.zeros_like(own) for source, own in scene.own.items()}


def _filled(value: float) -> Attack:
    """A number in every second channel, on the diagonal of a Gram matrix."""

    def attack(scene: Scene) -> Tensors:
        update = {}
        for source, own in scene.own.items():
            values = (own.diagonal() if own.ndim == 2 else own).clone()
            values[::2] = value
            update[source] = torch.diag(values) if own.ndim == 2 else values
        return update

    return attack


def _rank_one(scene: Scene) -> Tensors:
    """All channels perfectly correlated, with random signs, on the largest diagonal that passes."""
    update = _sums(_half)(scene)
    for source, diagonal in update.items():
        signs = torch.randn(len(diagonal), generator=scene.generator()).sign()
        root = diagonal.diagonal().sqrt() * signs
        update[source] = torch.outer(root, root)
    return update


def _not_positive(scene: Scene) -> Tensors:
    return {source: own - 2 * torch.diag(own.diagonal()) for source, own in scene.own.items()}


def _negative_eigenvalue(scene: Scene) -> Tensors:
    """A diagonal like anyone's, but correlations beyond 1."""
    update = {}
    for source, own in scene.own.items():
        root = own.diagonal().clamp(min=0).sqrt()
        update[source] = 3 * torch.outer(root, root)
        update[source].diagonal().copy_(own.diagonal())
    return update


def _with_squares(attack: Attack) -> Attack:
    """The attack with upper triangles unfolded to matrices before it, and folded again after it."""

    def folded(scene: Scene) -> Tensors:
        return scene.fold(attack(unfolded(scene)))

    return folded


def unfolded(scene: Scene) -> Scene:
    """The scene with Gram matrices [in, in] instead of their upper triangles."""
    others = [(_squares(update), n_tokens) for update, n_tokens in scene.others]
    return replace(scene, own=_squares(scene.own), others=others)


def _squares(update: Tensors) -> Tensors:
    return {source: square(upper) for source, upper in update.items()}


# ---- weights and counts ------------------------------------------------------------------------------


def _changed_weights(change: Callable[[Tensor], Tensor]) -> Attack:
    def attack(scene: Scene) -> Tensors:
        return {
            name: tensor if tensor.dtype == torch.bool else change(tensor)
            for name, tensor in scene.own.items()
        }

    return attack


def _count(share: Callable[[Scene], float]) -> Attack:
    """Report outliers in odd blocks and none in even ones, so that sparsity moves from block to block."""

    def attack(scene: Scene) -> Tensors:
        count = share(scene) * n_weights(scene.linears) if scene.seed % 2 else 0
        return {"outliers": torch.tensor([int(count)])}

    return attack


def _most_counted(scene: Scene) -> float:
    return 1 / scene.target.config.owl_m


def _allowed_count(scene: Scene) -> float:
    shares = sorted(float(update["outliers"][0]) for update, _ in scene.others)
    usual = shares[len(shares) // 2] / n_weights(scene.linears)
    return min(_most_counted(scene), _JUST_UNDER * 4 * (usual + 0.005))


_NAN = float("nan")
_SUM_ATTACKS: dict[str, Attack] = {
    "1e30 in half of the channels": _filled(1e30),
    "3.3e38 in half of the channels": _filled(3.3e38),
    "NaN": _filled(_NAN),
    "100 times the others": _sums(_as_the_others, "100"),
    "the others', just under the bound": _sums(_as_the_others),
    "half of the channels, just under the bound": _sums(_half),
    "half of the channels in proportion, just under the bound": _sums(_half_in_proportion),
    "upside down, just under the bound": _sums(_upside_down),
    "half of the channels, 3 times the others": _sums(_half, "3"),
    "noise, just under the bound": _sums(_noise),
    "zeros": _zeros,
}
_MASK_ATTACKS: dict[str, Attack] = {
    "inverted mask": _masks(_inverted),
    "random mask": _masks(_random),
    "prunes the most important columns": _masks(_same_columns),
}
ATTACKS: dict[str, dict[str, Attack]] = {
    "mask": {
        **_MASK_ATTACKS,
        "prunes everything": lambda scene: {name: torch.ones_like(t) for name, t in scene.own.items()},
    },
    "statistics": _SUM_ATTACKS,
    "gram": {
        name: _with_squares(attack)
        for name, attack in {
            **_SUM_ATTACKS,
            "all channels correlated, just under the bound": _rank_one,
            "negative diagonal": _not_positive,
            "negative eigenvalue": _negative_eigenvalue,
        }.items()
    },
    "weights": {
        **_MASK_ATTACKS,
        "weights times 1000": _changed_weights(lambda weight: 1000 * weight),
        "foreign weights": _changed_weights(lambda weight: weight.flip(0)),
        "NaN": _changed_weights(lambda weight: torch.full_like(weight, _NAN)),
    },
    "outliers": {
        "1e9": _count(lambda scene: 1e9),  # noqa: ARG005
        "as many as can be, or none": _count(_most_counted),
        "just under the bound, or none": _count(_allowed_count),
        "zeros": lambda scene: {name: torch.zeros_like(t) for name, t in scene.own.items()},
    },
}
