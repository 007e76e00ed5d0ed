"""The page about a healing: what it recovered, what left the participants, and the loss round by round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from fedprllm.evaluation.results import Perplexity
from fedprllm.healing.in_process import HealResult
from fedprllm.healing.records import HealRecord
from fedprllm.report import plots
from fedprllm.report.cautions import left_out, sentence
from fedprllm.report.drawing import draw
from fedprllm.report.layout import Cell, Notes, Page, Part, Plot, Section, Table, Verdict, code, numbered
from fedprllm.report.obtained import loading
from fedprllm.report.setting import model_and_versions, options
from fedprllm.report.words import change, count, listed, mean_perplexity, percent, perplexity, seconds, size

__all__ = ["healing_page"]

_ADAPTED = (
    "Part of a gain is that the model knows the participants' text better, which is no recovery: heal the "
    "dense model too, on the same text, and compare."
)
_TOWARD_DENSE = (
    "Healing towards the dense model looks at the participants' text only: elsewhere it may recover less."
)


def healing_page(result: HealResult, run: Path) -> Page:
    """The page about a complete healing.

    Args:
        result: The healing.
        run: Its folder.
    """
    record = result.record
    return Page(
        "report of a federated healing" if record.run_id else "healing report",
        _name(record),
        _summary(record),
        _tiles(record),
        [_obtained(record, run), _payoff(record), _shared(record), _cautions(record, run)],
        [_curve(record), _time(record)],
        [_setting(record)],
    )


def _name(record: HealRecord) -> str:
    """A hub id as it is; of a path only what names the run and the model."""
    path = Path(record.model.source)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _summary(record: HealRecord) -> str:
    n = len(record.participants)
    return (
        f"{record.n_parameters:,} of {record.n_model_parameters:,} parameters of {_name(record)} (norms, "
        f"biases and one scale for each row of a Linear) were trained by {count(n, 'participant')} in "
        f"{count(record.config.rounds, 'round')}. {_verdict(record)}"
    ).strip()


def _tiles(record: HealRecord) -> list[tuple[str, str, str]]:
    tiles = []
    if record.evaluation:
        before, healed = (mean_perplexity(record.evaluation[name]) for name in ("before", "healed"))
        value = f"{perplexity(before)} → {perplexity(healed)}"
        tiles.append(("perplexity", value, change(healed, before)))
    trained = f"of {record.n_model_parameters:,} parameters"
    verb = "each sent" if record.run_id else "each would send"
    rounds = f"in each of {count(record.config.rounds, 'round')}"
    masks = "under masks" if record.config.secure else "in the clear"
    return [
        *tiles,
        ("trained", f"{record.n_parameters:,}", trained),
        (verb, size(record.update_bytes), rounds),
        ("participants", f"{len(record.participants)}", masks),
    ]


# Answers ---------------------------------------------------------------------------------------


def _obtained(record: HealRecord, run: Path) -> Section:
    folder = f"{run.resolve().name}/{next(iter(record.models.values()))}"
    where = Markup("An ordinary Hugging Face folder, {}, which loads as usual:").format(code(folder))
    same = (
        "Its tensors have the names, shapes, types and zeros that they had before: it is as large and as "
        f"fast. Its parameters are those with which round {record.best_round} began."
    )
    return Section("got", "What you got", [where, loading(folder), same])


def _verdict(record: HealRecord) -> str:
    """Whether healing paid off, from the loss on held-out windows and the perplexities."""
    measured = dict(record.held_out)
    if measured and record.best_round == 0:
        never = f"{_loss(record)} on held-out windows never fell"
        return f"Healing did not pay off: {never}, so the model is unchanged."
    found = record.evaluation
    if found:
        before, healed = found["before"], found["healed"]
        better = [b.text for b, h in zip(before, healed, strict=True) if h.perplexity < b.perplexity]
        means = mean_perplexity(before), mean_perplexity(healed)
        by = change(means[1], means[0])
        n = "any of" if not better else "all" if len(better) == len(before) else f"{len(better)} of"
        where = before[0].text if len(before) == 1 else f"{n} {len(before)} texts"
        verb = "lowered" if better else "did not lower"
        figures = f"{perplexity(means[0])} → {perplexity(means[1])}" + (f" ({by})" if by else "")
        return f"Healing {verb} the perplexity on {where}: {figures}."
    if not measured:
        return "Whether it helped was not measured."
    first, best = measured[0], measured[record.best_round]
    figures = (
        f"Healing lowered {_loss(record)} on held-out windows from {first:.4f} to {best:.4f} nats per token"
    )
    if record.config.loss != "text":
        return f"{figures}."
    return f"{figures}: their perplexity fell by {percent(1 - math.exp(best - first))}."


def _loss(record: HealRecord) -> str:
    """What healing lowers."""
    return "the loss" if record.config.loss == "text" else "the distance to the dense model's predictions"


def _payoff(record: HealRecord) -> Section:
    section = Section("payoff", "Did it pay off?", [Verdict(_verdict(record))])
    measured = dict(record.held_out)
    if measured:
        section.parts.append(
            f"On the participants' held-out windows, {_loss(record)} was {measured[0]:.4f} before, "
            f"{measured[record.best_round]:.4f} with the parameters of the result, those of round "
            f"{record.best_round}."
        )
    if record.evaluation:
        section.parts.append(_perplexities(record.evaluation["before"], record.evaluation["healed"]))
        section.parts.append("Lower is better.")
    else:
        section.parts.append("The perplexity was not measured: the healing had no evaluation text.")
    silent = [name for name in record.participants if name not in _texts(record)]
    if record.run_id and record.evaluation and silent:
        section.parts.append(
            f"Not reported by {listed(silent)}: a participant measures only if it names held-out text."
        )
    return section


def _texts(record: HealRecord) -> set[str]:
    return {row.text for rows in record.evaluation.values() for row in rows}


def _perplexities(before: Sequence[Perplexity], healed: Sequence[Perplexity]) -> Table:
    rows: list[list[str | Cell]] = [
        [
            old.text,
            perplexity(old.perplexity),
            Cell(perplexity(new.perplexity), change(new.perplexity, old.perplexity)),
        ]
        for old, new in zip(before, healed, strict=True)
    ]
    return Table("Perplexity by text", ("text", "before", "healed"), "lrr", rows)


def _shared(record: HealRecord) -> Section:
    left = "left" if record.run_id else "would leave"
    verb = "sent" if record.run_id else "would send"
    seen = (
        "only sums over participants" if record.config.secure else "each participant's gradients, one by one"
    )
    n = record.config.rounds
    rows: list[list[str | Cell]] = [
        [
            "kinds",
            f"The gradient of the summed loss with respect to {record.n_parameters:,} parameters, the loss "
            "and the number of tokens; now and then the summed loss on held-out windows.",
        ],
        ["per round", f"{record.update_bytes:,} bytes"],
        ["in total, at most", f"{n * record.update_bytes:,} bytes ({size(n * record.update_bytes)})"],
        ["rounds", f"{n:,}"],
        ["seen by the server", seen],
        ["seen by the others", "the parameters that a round begins with, and the model card"],
    ]
    each = f"Each participant {verb} {size(record.update_bytes)} a round"
    answer = f"{each}: gradients, no text. The server sees {seen}."
    parts: list[Part] = [
        Verdict(answer),
        Table("What leaves a participant, and who sees it", ("", ""), "ll", rows),
        _participants(record),
    ]
    if not record.run_id:
        parts.append("This healing took place in one process, so nothing left the machine.")
    return Section("shared", f"What {left} each participant", parts)


def _participants(record: HealRecord) -> Table:
    last = next((one.losses for one in reversed(record.rounds) if one.losses), {})
    first = next((one.losses for one in record.rounds if one.losses), {})
    rows: list[list[str | Cell]] = [
        [
            name,
            "not known" if one.n_windows is None else f"{one.n_windows:,}",
            f"{first[name]:.3f}" if name in first else "in the sum only",
            f"{last[name]:.3f}" if name in last else "",
        ]
        for name, one in record.participants.items()
    ]
    names = ("participant", "windows", "loss in its first round", "in its last")
    return Table("Participants", names, "lrrr", numbered(rows))


def _cautions(record: HealRecord, run: Path) -> Section:
    gone = [f"{name} was left out ({reason})." for name, reason in left_out(run).items()]
    always = _ADAPTED if record.config.loss == "text" else _TOWARD_DENSE
    notes = Notes([*gone, *map(sentence, record.notes), always])
    return Section("cautions", "What to be careful about", [notes])


# Evidence --------------------------------------------------------------------------------------


def _curve(record: HealRecord) -> Section:
    nan = math.nan
    series = {
        "training text": [nan if one.loss is None else one.loss for one in record.rounds],
        "held-out text": [nan if one.held_out_loss is None else one.held_out_loss for one in record.rounds],
    }
    series = {name: values for name, values in series.items() if not all(map(math.isnan, values))}
    held_out = record.held_out
    before = held_out[0][1] if held_out else series["training text"][0]
    caption = (
        "Mean loss per token in nats, with the parameters that a round began with; lower is better. The "
        "windows of training text differ from round to round; those of held-out text are the same."
    )
    label = f"Loss by round: {before:.3f} in round 0."
    if held_out:
        label = (
            f"Loss by round: on held-out text {before:.3f} in round 0 and {held_out[-1][1]:.3f} at the end."
        )
    axes = ("round", "loss in nats")
    figure = draw(plots.lines, series, label, axes, (before, "before"), bridged=True)
    rows: list[list[str | Cell]] = [
        [
            str(one.number),
            "" if one.loss is None else f"{one.loss:.4f}",
            "" if one.held_out_loss is None else f"{one.held_out_loss:.4f}",
            f"{one.learning_rate:.2g}",
            "taken back" if one.taken_back else "",
        ]
        for one in record.rounds
    ]
    names = ("round", "training text", "held-out text", "largest step", "")
    table = Table("Every round", names, "lrrrl", rows)
    return Section("loss", "Loss by round", [Plot(figure, caption), table])


def _time(record: HealRecord) -> Section:
    spent = sum(one.seconds for one in record.rounds)
    where = f"on {record.config.device} in {record.config.dtype}"
    words = f"{seconds(spent)} for all rounds {where}; reading and evaluating are not included."
    return Section("time", "Time", [words])


def _setting(record: HealRecord) -> Section:
    about = [["parameters", f"{record.n_model_parameters:,}"]]
    software = model_and_versions(record.model.source, record.model.fingerprint, about, record.versions)
    return Section("setting", "Settings", [*options(record.config), *software])
