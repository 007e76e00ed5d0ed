"""Zero-shot tasks before and after pruning and healing, with lm-eval and the tasks of BIG-bench.

The tasks come with the source archive of the package bigbench 1.0.0 (Apache 2.0), which holds them as files:
download it, unpack it and name the folder. Which tasks are used follows from the files alone: those in
English with at least 100 questions, one right answer of three to seven, and at most 450 characters a
question. The answer counts that the model finds most likely as the continuation of the question.

    python -m benchmarks.zero_shot --bigbench bigbench-1.0.0 --models dense=FOLDER votes=FOLDER ...
        [--questions 60]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks._harness import SEED, given, machine
from fedprllm.evaluation.zero_shot import zero_shot

_ANSWERS, _QUESTIONS, _CHARACTERS = range(3, 8), 100, 450
_LATIN = 0.9  # part of the characters that are ASCII in a task that counts as English
_OTHER = {"non-English", "non-language", "translation", "multilingual", "low-resource language"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bigbench", type=Path, required=True, help="folder of the unpacked archive")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--questions", type=int, default=60, help="of every task")
    parser.add_argument("--tasks", nargs="*", help="only these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="precision of the forward passes")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        tasks = _write_tasks(options.bigbench, Path(temporary), options.questions, options.tasks)
        accuracies = {}
        # Folders may contain a =, as those of structures do; names may not.
        for name, _, folder in (entry.partition("=") for entry in options.models):
            accuracies[name] = _measured(folder, list(tasks), Path(temporary), options)
            print(name, round(mean(accuracies[name].values()), 4), file=sys.stderr, flush=True)
    result = {
        "benchmark": "zero_shot",
        "options": given(),
        "questions": options.questions,
        "chance": tasks,
        "accuracies": accuracies,
        "machine": machine(),
    }
    print(json.dumps(result))


def _write_tasks(
    bigbench: Path, out: Path, n_questions: int, wanted: Sequence[str] | None
) -> dict[str, float]:
    """Write what lm-eval needs of every suitable task; returns the accuracy of guessing by task."""
    chances = {}
    files = sorted(bigbench.glob("bigbench/benchmark_tasks/*/task.json"))
    if not files:
        raise SystemExit(f"{bigbench} has no bigbench/benchmark_tasks: name the folder of bigbench 1.0.0")
    for file in files:
        name = file.parent.name
        if wanted and name not in wanted:
            continue
        task = json.loads(file.read_text("utf-8"))
        documents = _documents(task)
        if not _suits(task, documents):
            continue
        chosen = random.Random(SEED).sample(documents, min(n_questions, len(documents)))
        chances[name] = mean(1 / len(document["answers"]) for document in chosen)
        lines = out / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(document) + "\n" for document in chosen), "utf-8")
        # JSON is YAML.
        (out / f"{name}.yaml").write_text(
            json.dumps(
                {
                    "task": f"zero_shot_{name}",
                    "dataset_path": "json",
                    "dataset_kwargs": {"data_files": {"test": str(lines)}},
                    "test_split": "test",
                    "output_type": "multiple_choice",
                    "doc_to_text": "{{question}}",
                    "doc_to_choice": "{{answers}}",
                    "doc_to_target": "right",
                    "metric_list": [{"metric": "acc"}],
                }
            )
        )
    return chances


def _documents(task: dict[str, Any]) -> list[dict[str, Any]]:
    """A task's questions that have one right answer."""
    before, after = task.get("example_input_prefix", "\nQ: "), task.get("example_output_prefix", "\nA: ")
    found = []
    for example in task.get("examples", []):
        scores = example.get("target_scores")
        question = example["input"] if isinstance(example["input"], str) else example["input"][0]
        if (
            isinstance(scores, dict)
            and sorted(scores.values())[-2:] == [0, 1]
            and set(scores.values()) == {0, 1}
        ):
            answers = list(scores)
            text = f"{before}{question}{after}".strip()
            found.append({"question": text, "answers": answers, "right": list(scores.values()).index(1)})
    return found


def _suits(task: dict[str, Any], documents: Sequence[dict[str, Any]]) -> bool:
    if len(documents) < _QUESTIONS or _OTHER & set(task.get("keywords", [])):
        return False
    n_answers = round(mean(len(document["answers"]) for document in documents))
    text = [document["question"] for document in documents]
    latin = sum(character.isascii() for question in text for character in question) / sum(map(len, text))
    return n_answers in _ANSWERS and mean(map(len, text)) <= _CHARACTERS and latin >= _LATIN


def _measured(
    folder: str, tasks: Sequence[str], task_folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Accuracy by task."""
    rows = zero_shot(
        folder,
        [f"zero_shot_{task}" for task in tasks],
        task_folder=task_folder,
        dtype=options.dtype,
        device=options.device,
    )
    return {row["task"].removeprefix("zero_shot_"): row["value"] for row in rows if row["metric"] == "acc"}


# The page ------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The section's table: accuracies by task in percent, and their mean with its standard error."""
    names = list(result["accuracies"])
    rows = [
        {"task": task, "chance": _percent(chance)}
        | {name: _percent(result["accuracies"][name][task]) for name in names}
        for task, chance in result["chance"].items()
    ]
    for title, tasks in {"mean": list(result["chance"]), "mean of the answered": _answered(result)}.items():
        rows += [
            {
                "task": f"{title} ({len(tasks)} tasks)",
                "chance": _percent(mean(result["chance"][task] for task in tasks)),
            }
            | {name: _percent(mean(result["accuracies"][name][task] for task in tasks)) for name in names},
            {"task": "its standard error", "chance": ""}
            | {name: _percent(_standard_error(result, name, tasks)) for name in names},
        ]
    return {
        f"accuracy in percent on {result['questions']} questions of every task; the answered are those in "
        f"which {names[0]} is two standard errors better than guessing": rows
    }


def _answered(result: dict[str, Any]) -> list[str]:
    """The tasks in which the first model is better than guessing, by two standard errors."""
    first = next(iter(result["accuracies"].values()))
    return [
        task
        for task, chance in result["chance"].items()
        if first[task] - chance > 2 * math.sqrt(chance * (1 - chance) / result["questions"])
    ]


def _standard_error(result: dict[str, Any], name: str, tasks: Sequence[str]) -> float:
    """Standard error of a mean accuracy over tasks, for other questions of the same tasks."""
    found = [result["accuracies"][name][task] for task in tasks]
    return math.sqrt(sum(each * (1 - each) / result["questions"] for each in found)) / len(found)


def _percent(share: float) -> float:
    return round(100 * share, 1)


if __name__ == "__main__":
    main()
