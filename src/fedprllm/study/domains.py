"""Participants with different text: how good a model is on a participant's own text and on the others'."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from fedprllm.study.results import Measured, Spread, models_on, names_of_settings, texts_of

__all__ = ["own_and_others"]


def own_and_others(cells: Sequence[Measured]) -> dict[str, tuple[Spread, Spread]]:
    """Perplexity on a participant's own text and on the others', averaged over participants, by setting.

    A model pruned together serves all participants, so both values are its mean over all texts.
    """
    names = names_of_settings([cell for cell, _ in cells])
    found: dict[str, tuple[list[float], list[float]]] = {}
    for cell, record in cells:
        texts = texts_of([(cell, record)])
        own, others = [], []
        for text in texts:
            by_model = models_on(record, text)
            alone = cell.partition == "domain" and text in by_model
            own.append(by_model[text] if alone else mean(by_model.values()))
            rest = [value for name, value in by_model.items() if name != text]
            others.append(mean(rest) if alone and rest else own[-1])
        row = found.setdefault(names[cell.setting_key], ([], []))
        row[0].append(mean(own))
        row[1].append(mean(others))
    return {name: (Spread(tuple(own)), Spread(tuple(others))) for name, (own, others) in found.items()}
