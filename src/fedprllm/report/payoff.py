"""Whether pruning together paid off, for whom, and what it cost: sentences computed from the perplexities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedprllm.report.facts import Facts, Perplexities
from fedprllm.report.layout import Cell, Notes, Section, Table, Verdict, code
from fedprllm.report.words import (
    change,
    count,
    factor,
    listed,
    mean_perplexity,
    percent,
    percent_range,
    perplexity,
)

__all__ = ["cost", "headline", "payoff", "quoted", "texts_of"]

# Two perplexities that differ by less are called equal: about as much as another machine makes of a run.
_EQUAL = 0.01
_ALONE, _DENSE = "that of the model made alone", "the dense model's"
_FACTORS = 2.0  # a perplexity that is higher by more is given as a multiple


@dataclass(frozen=True)
class Text:
    """The perplexities on one text; None where one was not measured.

    Attributes:
        name: Name of the text, which is a participant's if it is that participant's own.
        dense: Of the dense model.
        pruned: Of the run's model; None if each participant has a model of its own.
        own: Of the model that the participant of the text's name made alone.
        others: Of the other models made alone, by participant.
        pooled: Of the model calibrated on all text in one place.
    """

    name: str
    dense: float | None
    pruned: float | None
    own: float | None
    others: dict[str, float]
    pooled: float | None

    @property
    def cost(self) -> float | None:
        """By what pruning multiplied the perplexity."""
        return None if self.dense is None or self.pruned is None else self.pruned / self.dense

    @property
    def alone(self) -> dict[str, float]:
        """Of all models made alone, by participant."""
        return self.others if self.own is None else {self.name: self.own, **self.others}


def texts_of(facts: Facts) -> list[Text]:
    """What was measured, text by text."""
    models = facts.measured
    own = facts.pruned_models[1]
    pruned = own[0] if len(own) == 1 and (facts.strategy.server_votes or facts.strategy.pools_text) else None
    names = dict.fromkeys(row.text for rows in models.values() for row in rows)
    alone = {name.removeprefix("local-only: "): name for name in models if name.startswith("local-only: ")}

    def of(model: str | None, text: str) -> float | None:
        return next((row.perplexity for row in models.get(model or "", ()) if row.text == text), None)

    return [
        Text(
            text,
            of("dense", text),
            of(pruned, text),
            of(alone.get(text), text),
            {
                name: value
                for name, model in alone.items()
                if name != text and (value := of(model, text)) is not None
            },
            of("centralized", text) if pruned != "centralized" else None,
        )
        for text in names
    ]


def payoff(facts: Facts) -> Section:
    """The verdict and the perplexities that it rests on."""
    section = Section("payoff", "Did it pay off?")
    texts = texts_of(facts)
    if not any(text.pruned is not None or text.alone for text in texts):
        section.parts.extend(["Not measured: the run had no evaluation text.", _how_to_measure(facts)])
        return section
    verdict = headline(facts, texts)
    section.parts.extend([Verdict(verdict)] if verdict else [])
    notes = [*_compared(texts), *_costs(facts, texts), *_pooled(texts)]
    section.parts.extend([Notes(notes)] if notes else [])
    section.parts.append(_table(facts, texts))
    section.parts.append("Lower is better; changes are relative to the dense model.")
    section.parts.extend(_missing(facts, texts))
    return section


def _how_to_measure(facts: Facts) -> str:
    if facts.networked:
        return Markup(
            "A participant that names text of its own with {} learns what pruning cost there, and the "
            "report shows it."
        ).format(code("--held-out"))
    folder = next(iter(facts.shown_folders.values()))
    return Markup("To measure, name text that was not used for calibration: {}, or {} in the run.").format(
        code(f"fedprllm evaluate {folder} --text FILE"), code("--eval NAME=FILE")
    )


# Sentences -------------------------------------------------------------------------------------


def headline(facts: Facts, texts: Sequence[Text]) -> str:
    """The answer in a sentence; empty if nothing was measured."""
    own, elsewhere = _own_pairs(texts), _elsewhere(texts)
    where = {
        "on their own text": own,
        "on the others' text" if own else "on average over the texts": elsewhere,
    }
    found = {words: ratios for words, ratios in where.items() if ratios}
    if not found:
        return cost(facts, texts)
    names = {name for ratios in found.values() for name in ratios}
    if len(names) == 1:
        return _for_one(next(iter(names)), own, elsewhere)
    counts = [f"{_better_for(list(ratios.values()))} {words}" for words, ratios in found.items()]
    return f"Pruning together gave a better model than pruning alone {', and '.join(counts)}."


def _for_one(name: str, own: Mapping[str, float], elsewhere: Mapping[str, float]) -> str:
    where = {"on its own text": own.get(name), "on other text": elsewhere.get(name)}
    parts = [
        f"{'a better' if ratio < 1 - _EQUAL else 'no better'} model {words}"
        for words, ratio in where.items()
        if ratio is not None
    ]
    return f"For {name}, pruning together gave {' and '.join(parts)}, compared with pruning alone."


def _better_for(ratios: Sequence[float]) -> str:
    n = len(ratios)
    k = sum(ratio < 1 - _EQUAL for ratio in ratios)
    return f"for all {n} participants" if k == n else f"for {k or 'none'} of {n} participants"


def _own_pairs(texts: Sequence[Text]) -> dict[str, float]:
    """On each participant's own text, the perplexity together relative to alone."""
    return {
        text.name: _ratio(text.pruned, text.own)
        for text in texts
        if text.pruned is not None and text.own is not None
    }


def _elsewhere(texts: Sequence[Text]) -> dict[str, float]:
    """On the others' text, the same, by participant: the geometric mean over texts."""
    ratios: dict[str, list[float]] = {name: [] for text in texts for name in text.alone}
    for text in texts:
        for name, alone in text.others.items():
            if text.pruned is not None:
                ratios[name].append(_ratio(text.pruned, alone))
    return {name: _mean(each) for name, each in ratios.items() if each}


def _ratio(value: float, other: float) -> float:
    """One perplexity relative to another; two that are too large to be written are the same."""
    return 1.0 if value == other else value / other


def _mean(ratios: Sequence[float]) -> float:
    """Geometric mean: ∞ if a ratio is, since no gain elsewhere makes up for a model that is unusable."""
    if math.inf in ratios:
        return math.inf
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if all(ratios) else 0.0


def _compared(texts: Sequence[Text]) -> list[str]:
    """For whom the model made together is better than its own, worse or the same, and by how much."""
    own = _own_pairs(texts)
    return [
        *_split(own, "on their own text"),
        *_split(_elsewhere(texts), "on the others' text" if own else "on average over the texts"),
    ]


def _split(ratios: Mapping[str, float], where: str) -> list[str]:
    better = {name: ratio for name, ratio in ratios.items() if ratio < 1 - _EQUAL}
    worse = {name: ratio for name, ratio in ratios.items() if ratio > 1 + _EQUAL}
    same = [name for name in ratios if name not in better and name not in worse]
    sentences = [
        f"For {listed(list(group))}, the perplexity {where} is {_beside(group.values(), _ALONE)}."
        for group in (better, worse)
        if group
    ]
    if same:
        sentences.append(f"For {listed(same)}, the perplexity {where} is the same within {percent(_EQUAL)}.")
    return sentences


def _beside(ratios: Iterable[float], whose: str) -> str:
    """How perplexities compare with others: a range of percentages or, if they are far apart, of factors."""
    ratios = sorted(ratios)
    if ratios[-1] >= _FACTORS or not _same_sign(ratios):
        low, high = factor(ratios[0]), factor(ratios[-1])
        return f"{low if low == high else f'{low} to {high}'} times {whose}"
    side = "lower" if ratios[-1] < 1 else "higher"
    return f"{_shares(ratios)} {side} than {whose}"


def _shares(ratios: Iterable[float]) -> str:
    return percent_range(sorted(abs(ratio - 1) for ratio in ratios))


def _costs(facts: Facts, texts: Sequence[Text]) -> list[str]:
    """What pruning cost, unless the verdict says that."""
    if _own_pairs(texts) or _elsewhere(texts):
        return [cost(facts, texts)]
    if facts.strategy.server_votes and len(facts.participants) > 1:
        return [
            Markup(
                "Whether a participant could have made as good a model alone was not measured: prune with {} "
                "and measure on the same text."
            ).format(code("--strategy local-only"))
        ]
    return []


def cost(facts: Facts, texts: Sequence[Text]) -> str:
    """What pruning did to the perplexity, in a sentence; empty if it was not measured."""
    if all(text.pruned is None for text in texts):
        return _cost_alone(texts)
    costs = {text.name: text.cost for text in texts if text.cost is not None}
    if not costs:
        return ""
    lost = [name for name, ratio in costs.items() if not math.isfinite(ratio)]
    if lost:
        return f"The pruned model is unusable on {listed(lost)}: its perplexity is too large to be written."
    if len(costs) == 1:
        ((name, ratio),) = costs.items()
        text = next(text for text in texts if text.name == name)
        assert text.dense is not None
        assert text.pruned is not None
        return (
            f"Pruning {_verb([ratio])} the perplexity on {name} from {perplexity(text.dense)} to "
            f"{perplexity(text.pruned)} ({change(text.pruned, text.dense)})."
        )
    low, high = min(costs, key=lambda name: costs[name]), max(costs, key=lambda name: costs[name])
    where = f"all {len(costs)} texts"
    if facts.networked:
        where = f"the own text of the {len(costs)} participants that measured it"
    found = quoted(facts)
    mean = f"; geometric mean {found[0]} → {found[1]} ({found[2].split(',')[0]})" if found else ""
    if not _same_sign(costs.values()):
        return (
            f"Pruning changed the perplexity by {change(costs[low], 1)} ({low}) to {change(costs[high], 1)} "
            f"({high}){mean}."
        )
    verb = _verb(costs.values())
    ends = (low, high) if costs[high] >= 1 else (high, low)
    by = " to ".join(f"{percent(abs(costs[name] - 1))} ({name})" for name in ends)
    if costs[high] >= _FACTORS:
        by = f"{factor(costs[low])} ({low}) to {factor(costs[high])} ({high})"
        return f"Pruning multiplied the perplexity on {where} by {by}{mean}."
    return f"Pruning {verb} the perplexity on {where}, by {by}{mean}."


def _same_sign(ratios: Iterable[float]) -> bool:
    return len({ratio < 1 for ratio in ratios}) == 1


def _verb(ratios: Iterable[float]) -> str:
    return "lowered" if all(ratio < 1 for ratio in ratios) else "raised"


def _cost_alone(texts: Sequence[Text]) -> str:
    """What pruning alone did to the perplexity, on own and on others' text if it is known whose it is."""
    own = [text.own / text.dense for text in texts if text.own is not None and text.dense]
    others = [value / text.dense for text in texts if text.dense for value in text.others.values()]
    if not own + others or not all(map(math.isfinite, own + others)):
        return _range_alone(texts)
    if not own:
        return f"Pruned alone, the participants' models have perplexities {_beside(others, _DENSE)}."
    sentence = f"Pruned alone, the participants' models have perplexities {_beside(own, _DENSE)} on own text"
    return f"{sentence}, and {_beside(others, _DENSE)} on the others'." if others else f"{sentence}."


def _range_alone(texts: Sequence[Text]) -> str:
    values = [value for text in texts for value in text.alone.values()]
    if not values:
        return ""
    return (
        f"Pruned alone, the participants' models have perplexities from {perplexity(min(values))} to "
        f"{perplexity(max(values))}."
    )


def _pooled(texts: Sequence[Text]) -> list[str]:
    """How far the model is from one calibrated on all text in one place."""
    both = [
        text.pruned / text.pooled for text in texts if text.pruned is not None and text.pooled is not None
    ]
    if not both or not all(0 < ratio < math.inf for ratio in both):
        return []
    mean = _mean(both)
    if abs(mean - 1) <= _EQUAL:
        return [f"With all text in one place, the perplexity would be the same within {percent(_EQUAL)}."]
    side = "lower" if mean > 1 else "higher"
    by = percent(abs(1 / mean - 1))
    return [f"With all text in one place, the perplexity would be {by} {side}."]


def _missing(facts: Facts, texts: Sequence[Text]) -> list[str]:
    """Participants of a federation that did not report what pruning cost on their text."""
    silent = [name for name in facts.participants if name not in {text.name for text in texts}]
    if not facts.networked or not silent:
        return []
    return [f"Not reported by {listed(silent)}: a participant measures only if it names held-out text."]


# Figures ---------------------------------------------------------------------------------------


def quoted(facts: Facts) -> tuple[str, str, str] | None:
    """The perplexity before and after pruning and its change, as text."""
    table, names = facts.pruned_models
    if "dense" not in table or not names:
        return None
    dense = mean_perplexity(table["dense"])
    after = sorted(mean_perplexity(table[name]) for name in names)
    where = _where(table)
    if len(after) == 1:
        by = change(after[0], dense)
        return perplexity(dense), perplexity(after[0]), f"{by}, {where}" if by else where
    return perplexity(dense), f"{perplexity(after[0])} to {perplexity(after[-1])}", where


def _where(table: Perplexities) -> str:
    texts = [row.text for row in table["dense"]]
    return f"on {texts[0]}" if len(texts) == 1 else f"geometric mean over {count(len(texts), 'text')}"


def _table(facts: Facts, texts: Sequence[Text]) -> Table:
    """One row per text: dense, pruned, alone and pooled, as far as they were measured."""
    together = facts.strategy.server_votes and len(facts.participants) > 1
    columns: dict[str, Callable[[Text], str | Cell]] = {"dense": lambda text: _value(text.dense)}
    if any(text.pruned is not None for text in texts):
        name = "pruned together" if together else "pruned"
        columns[name] = lambda text: _value(text.pruned, text.dense)
    if any(text.own is not None for text in texts):
        columns["alone, own text"] = lambda text: _value(text.own, text.dense)
    if any(text.others for text in texts):
        whose = "alone, another's text" if any(text.own is not None for text in texts) else "each alone"
        columns[whose] = lambda text: _span(list(text.others.values()))
    if any(text.pooled is not None for text in texts):
        columns["all text in one place"] = lambda text: _value(text.pooled, text.dense)
    rows = [[text.name, *(value(text) for value in columns.values())] for text in texts]
    whose = "participant" if facts.networked else "text"
    return Table(
        "Perplexity by text", (whose, *columns), "l" + "r" * len(columns), rows, wide=len(columns) > 1
    )


def _value(value: float | None, dense: float | None = None) -> str | Cell:
    if value is None:
        return ""
    return Cell(perplexity(value), change(value, dense) if dense is not None else "")


def _span(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = perplexity(min(values)), perplexity(max(values))
    return low if low == high else f"{low} to {high}"
