"""The output files of a study: tables as JSON, CSV and Markdown, the page and its plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedprllm.config import PruneConfig
from fedprllm.evaluation.results import Perplexity
from fedprllm.files import write_json, write_text
from fedprllm.study.questions import QUESTIONS
from fedprllm.study.results import Results, answers, how_made, spread_by_text, texts_of, tie_shares
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
        "model": results.model.as_json(),
        "versions": results.versions,
        "config": results.config.model_dump(mode="json"),
        "dense": [row.as_json() for row in results.dense],
        "cells": [{"questions": cell.questions, **record.as_json()} for cell, record in results.cells],
    }
    write_json(out / "results.json", value)


def _rows(results: Results) -> Iterator[dict[str, Any]]:
    """One row per model and text."""
    changing = [*PruneConfig.model_fields, "participants", "partition"]
    for row in results.dense:
        yield {"questions": "", "model": "dense", "text": row.text, **_losses(row)}
    for cell, record in results.cells:
        for model, rows in record.models.items():
            for row in rows:
                yield {
                    "questions": " ".join(cell.questions),
                    "model": model,
                    "text": row.text,
                    **_losses(row),
                    "seed": cell.config.seed,
                    **{name: record.setting[name] for name in changing if name in record.setting},
                    "made": record.made,
                    "zeros": record.n_zeros / record.n_prunable,
                    "ties": record.tie_share,
                    "update_bytes": record.update_bytes,
                    "update_bytes_per_block": record.update_bytes_per_block,
                    "seconds": record.seconds,
                }


def _losses(row: Perplexity) -> dict[str, Any]:
    return row.model_dump(include={"perplexity", "nll", "n_tokens"})


def _markdown(results: Results) -> str:
    lines = [
        "# Study",
        "",
        f"Perplexity, mean ± standard deviation over seeds {list(results.config.seeds)}. Settings made by a "
        "run were pruned from the start; derived ones were decided from stored updates, which gives the same "
        "weights.",
        "",
    ]
    dense = ", ".join(f"{row.text} {row.perplexity:.2f}" for row in results.dense)
    lines += [f"Dense: {dense}.", ""]
    for question in results.questions:
        cells = results.of(question)
        known = QUESTIONS.get(question)
        lines += [f"## {known.title if known else question}", ""]
        if known:
            lines += [f"{known.paper}", ""]
        texts = texts_of(cells)
        lines += ["| | " + " | ".join(texts) + " | prunes decided by a tie | made by |"]
        lines += ["|---|" + "---:|" * (len(texts) + 1) + "---|"]
        shares, made = tie_shares(cells), how_made(cells)
        for name, row in spread_by_text(cells).items():
            values = " | ".join(str(row[text]) if text in row else "" for text in texts)
            lines.append(f"| {name} | {values} | {shares[name]:.1%} | {made[name]} |")
        lines += [""] + [f"* {sentence}" for sentence in answers(results, question)] + [""]
    return "\n".join(lines)
