"""The files that a study writes: tables for readers, spreadsheets and programs, the page and its plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedprllm.config import PruneConfig
from fedprllm.files import write_json, write_text
from fedprllm.study.questions import QUESTIONS
from fedprllm.study.results import Results, answers, spread_by_text, texts_of, tie_shares
from fedprllm.study.study_page import write_page

__all__ = ["write_results"]


def write_results(results: Results, out: Path) -> None:
    """Write ``results.json``, ``results.csv``, ``results.md``, ``report.html`` and ``plots/``."""
    rows = list(_rows(results))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "results.csv", stream.getvalue())
    write_text(out / "results.md", _markdown(results))
    write_page(results, out)
    value = {
        **results.about,
        "config": results.config.model_dump(mode="json"),
        "dense": results.dense,
        "cells": [{"questions": cell.questions, **found} for cell, found in results.cells],
    }
    write_json(out / "results.json", value)


def _rows(results: Results) -> Iterator[dict[str, Any]]:
    """One row for each model and text."""
    changing = [*PruneConfig.model_fields, "participants", "partition"]
    for row in results.dense:
        yield {"questions": "", "model": "dense", "text": row["text"], **_losses(row)}
    for cell, found in results.cells:
        for model, rows in found["models"].items():
            for row in rows:
                yield {
                    "questions": " ".join(cell.questions),
                    "model": model,
                    "text": row["text"],
                    **_losses(row),
                    "seed": cell.config.seed,
                    **{name: found["setting"][name] for name in changing if name in found["setting"]},
                    "zeros": found["n_zeros"] / found["n_prunable"],
                    "ties": found["n_ties"] / found["n_pruned"] if found["n_pruned"] else 0.0,
                    "update_bytes": found["update_bytes"],
                    "update_bytes_per_block": found["update_bytes_per_block"],
                    "seconds": found["seconds"],
                }


def _losses(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"perplexity": row["perplexity"], "nll": row["nll"], "n_tokens": row["n_tokens"]}


def _markdown(results: Results) -> str:
    lines = [
        "# Study",
        "",
        f"Perplexity, mean ± standard deviation over seeds {list(results.config.seeds)}.",
        "",
    ]
    dense = ", ".join(f"{row['text']} {float(row['perplexity']):.2f}" for row in results.dense)
    lines += [f"Dense: {dense}.", ""]
    for question in results.questions:
        cells = results.of(question)
        known = QUESTIONS.get(question)
        lines += [f"## {known.title if known else question}", ""]
        if known:
            lines += [f"{known.paper}", ""]
        texts = texts_of(cells)
        lines += ["| | " + " | ".join(texts) + " | prunes decided by a tie |"]
        lines += ["|---|" + "---:|" * (len(texts) + 1)]
        shares = tie_shares(cells)
        for name, row in spread_by_text(cells).items():
            values = " | ".join(str(row[text]) if text in row else "" for text in texts)
            lines.append(f"| {name} | {values} | {shares[name]:.1%} |")
        lines += [""] + [f"* {sentence}" for sentence in answers(results, question)] + [""]
    return "\n".join(lines)
