"""Healing alone or together, on private or public text, beside the dense model healed the same way.

Every participant has one kind of text. A model is healed by all together, by one of them on its own text, or
on public text. Each healing sees the same number of windows. Perplexities are geometric means: over held-out
text of the kind a participant has (own), of the others' kinds (others), and on text of a kind that nobody has
(nobody). Beside each stands the dense model healed in the same way on the same text: what the pruned model
lacks against it is what healing did not recover; the rest is adaptation to the text.

    python -m benchmarks.healing_study --texts FOLDER --public FILE --nobody FILE [--alone KIND ...]
        [--rounds 100] [--device cuda --processes 8] [--quick]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import machine
from benchmarks._healed import (
    DENSE,
    STARTS,
    VOTES,
    Healed,
    add_options,
    healed,
    in_processes,
    mean_of,
    perplexities_of,
    pruned,
    workers,
)
from benchmarks.solvers import gpu_name, texts_of
from fedprllm import HealConfig
from fedprllm.demo.compare import demo_model
from fedprllm.models.source import resolve_model

_TOGETHER, _PUBLIC, _NOBODY = "all", "public", "nobody"
_STARTS = [start for start in STARTS if start != "gram with admm, 50 %"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser, rounds=100)
    parser.add_argument("--public", type=Path, help="text that anyone has")
    parser.add_argument("--nobody", type=Path, required=True, help="text of a kind that nobody has")
    parser.add_argument("--alone", nargs="*", default=[], help="kinds whose participant heals alone too")
    parser.add_argument("--starts", nargs="*", default=_STARTS, help=", ".join(STARTS))
    parser.add_argument("--learning-rate", type=float, default=HealConfig().learning_rate)
    options = parser.parse_args()
    if options.quick:
        options.windows, options.length, options.rounds = 1, 64, 2
    model = resolve_model(options.model or demo_model())
    starts = [DENSE, *options.starts]
    with tempfile.TemporaryDirectory() as temporary, workers(options) as pool:
        out = Path(temporary)
        texts, held_out = texts_of(options.texts, out)
        measured = {**held_out, _NOBODY: options.nobody}
        folders = in_processes(pool, pruned, [(start, model, texts, out, options) for start in starts])
        before = in_processes(pool, perplexities_of, [(folder, measured, options) for folder in folders])
        ways = [
            (who, way)
            for start, folder in zip(starts, folders, strict=True)
            for who, way in _ways(start, folder, model, texts, measured, options)
        ]
        after = in_processes(
            pool,
            healed,
            [(way, out / f"{number}", options) for number, (_, way) in enumerate(ways)],
        )
    rows = [
        {"start": start, "healed on": "", **_columns("", found, list(held_out), options.alone)}
        for start, found in zip(starts, before, strict=True)
    ]
    for (who, way), found in zip(ways, after, strict=True):
        columns = _columns(who, found["perplexities"], list(held_out), options.alone)
        rows.append({"start": way.start, "healed on": who, **columns, "curve": found["curve"]})
    result = {
        "benchmark": "healing_study",
        "quick": options.quick,
        "participants": sorted(texts),
        "windows": options.windows,
        "window_length": options.length,
        "rounds": options.rounds,
        "learning_rate": options.learning_rate,
        "device": options.device,
        "rows": rows,
        "machine": machine() | gpu_name(options.device),
    }
    print(json.dumps(result))


def _ways(
    start: str,
    folder: Path,
    dense: Path,
    texts: Mapping[str, Path],
    measured: Mapping[str, Path],
    options: argparse.Namespace,
) -> list[tuple[str, Healed]]:
    """What to heal a model on, with the same number of windows each."""
    groups = {_TOGETHER: dict(texts)}
    if options.public is not None:
        groups[_PUBLIC] = {_PUBLIC: options.public}
    groups |= {name: {name: texts[name]} for name in options.alone}
    return [
        (
            who,
            Healed(
                start,
                folder,
                dense,
                group,
                measured,
                options.rounds,
                round_windows=len(texts) // len(group),
                learning_rate=options.learning_rate,
            ),
        )
        for who, group in groups.items()
    ]


def _columns(
    who: str, perplexities: Mapping[str, float], kinds: Sequence[str], alone: Sequence[str]
) -> dict[str, Any]:
    """Perplexity on all kinds, on nobody's kind, and on the kind of each one that also healed alone."""
    columns = {
        "all kinds": mean_of(perplexities, kinds),
        "nobody's kind": perplexities[_NOBODY],
        **{name: perplexities[name] for name in alone},
    }
    if who in alone:
        columns["others"] = mean_of(perplexities, [name for name in kinds if name != who])
    return {name: round(value, 2) for name, value in columns.items()}


def damage(result: dict[str, Any], start: str) -> float:
    """What healing by all leaves of a loss in perplexity, in units of the votes' before healing."""
    found = {(row["start"], row["healed on"]): row["all kinds"] for row in result["rows"]}
    unit = found[VOTES, ""] - found[DENSE, ""]
    return float((found[start, _TOGETHER] - found[DENSE, _TOGETHER]) / unit)


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The section's table: each healed model beside the dense one healed the same way."""
    dense = {row["healed on"]: row for row in result["rows"] if row["start"] == DENSE}
    rows = []
    for row in result["rows"]:
        reference = dense[row["healed on"]]
        shown = {name: value for name, value in row.items() if name != "curve"}
        if row["start"] != DENSE:
            shown |= {
                "above dense, all kinds": round(row["all kinds"] / reference["all kinds"], 3),
                "above dense, nobody's": round(row["nobody's kind"] / reference["nobody's kind"], 3),
            }
        rows.append(shown)
    names = list(dict.fromkeys(name for row in rows for name in row))
    title = (
        f"perplexity after {result['rounds']} rounds of {len(result['participants'])} windows of "
        f"{result['window_length']} tokens, on {result['machine'].get('gpu', result['device'])}"
    )
    return {title: [{name: row.get(name, "") for name in names} for row in rows]}


if __name__ == "__main__":
    main()
