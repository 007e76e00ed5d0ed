"""Every causal language model type of the installed transformers: what happens when it is pruned.

    python -m benchmarks.zoo [TYPE ...]

Each type is built as a tiny random model (`tests/zoo.py`), pruned one-shot by three participants, and
compared with a naive run on the whole model in memory (`tests/naive_run.py`). Without arguments, all types
are run and docs/architectures.md is written. The last line of the output is JSON. The exit status is 1 if a
type differs or ends with anything but an error in words.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from fedprllm import PruneConfig, prune
from fedprllm.errors import FedprllmError
from fedprllm.files import write_text
from tests.models import save_tiny
from tests.naive_run import differences
from tests.zoo import model_types, tiny_config, windows_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
MOST_PARAMETERS = 8_000_000


@dataclass(frozen=True)
class Outcome:
    """What happened to a type.

    Attributes:
        kind: ``agrees``, ``refused``, ``differs``, ``failed`` or ``not built``.
        words: The reason, or for a type that agrees, the number of prunable weights and what stays dense.
    """

    kind: str
    words: str


def outcome_of(model_type: str, n_participants: int = 3) -> Outcome:
    """Build, prune and compare one type."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            _build(model_type, folder / "model")
        except Exception as error:  # noqa: BLE001  from transformers' many configurations
            return Outcome("not built", _words(error))
        participants = [windows_of(number) for number in range(n_participants)]
        try:
            result = prune(folder / "model", participants, PruneConfig(), out=folder / "run")
        except FedprllmError as error:
            return Outcome("refused", str(error).replace(f"{folder}/", "").partition(". This arch")[0])
        except Exception as error:  # noqa: BLE001  a bare traceback is a finding
            return Outcome("failed", _words(error))
        found = differences(folder / "model", participants, result)
        if found:
            return Outcome("differs", "; ".join(found[:3]))
        return Outcome("agrees", _pruned(result))


def _build(model_type: str, folder: Path) -> None:
    config = tiny_config(model_type)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    n_parameters = sum(parameter.numel() for parameter in empty.parameters())
    if n_parameters > MOST_PARAMETERS:
        raise ValueError(f"{n_parameters:,} parameters even when shrunk")
    save_tiny(lambda: config, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(input_ids=windows_of(0)[:1], use_cache=False)


def _words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"


def _pruned(result: object) -> str:
    record = result.record  # type: ignore[attr-defined]
    n_experts = max((one.n_experts for block in record.blocks for one in block.experts.values()), default=0)
    found = [f"{n_experts} experts a block"] if n_experts else []
    if record.coverage < 1:
        found.append(f"{record.coverage:.1%} of the matrices")
    return ", ".join(found)


def page(outcomes: dict[str, Outcome]) -> str:
    """The page in Markdown."""
    counts = Counter(outcome.kind for outcome in outcomes.values())
    n_built = len(outcomes) - counts["not built"]
    lines = [
        "# Architectures",
        "",
        f"`python -m benchmarks.zoo` wrote this page with transformers {transformers.__version__}. It builds",
        "every type of causal language model as a tiny random model, prunes it one-shot with three",
        "participants, and compares the result with a naive run on the whole model in memory: forward hooks,",
        "Wanda, each participant's own masks block by block, votes.",
        "",
        "* **Agrees**: no vote differs, exactly k weights of each matrix are zero, none of them has fewer",
        "  votes than a kept one, and every other bit of the model is unchanged.",
        "* **Refused**: with the words shown, which say what the architecture does that cannot be pruned",
        "  [block by block](method.md).",
        "",
        f"Of {n_built} types that could be built, **{counts['agrees']} agree**, {counts['refused']} are",
        f"refused, {counts['differs']} differ and {counts['failed']} fail without words.",
        "",
    ]
    titles = {
        "agrees": ("Agree", "remarks"),
        "differs": ("Differ", "how"),
        "failed": ("Fail without words", "error"),
        "refused": ("Refused", "why"),
        "not built": ("Not built", "why"),
    }
    for kind, (title, about) in titles.items():
        rows = {name: outcome.words for name, outcome in outcomes.items() if outcome.kind == kind}
        if rows:
            lines += [f"## {title}", "", *_table(rows, about), ""]
    return "\n".join(lines).rstrip() + "\n"


def _cell(words: str) -> str:
    """An error's words in a cell of a table: a class in angle brackets would be taken for HTML and vanish."""
    return words.replace("|", " ").replace("<", "&lt;")


def _table(rows: dict[str, str], about: str) -> list[str]:
    plain = sorted(name for name, words in rows.items() if not words)
    table = [f"| type | {about} |", "|---|---|"]
    table += [f"| {name} | {_cell(words)} |" for name, words in sorted(rows.items()) if words]
    listed = [f"In full, without remarks: {', '.join(plain)}."] if plain else []
    return [*listed, *([""] if listed and len(table) > 2 else []), *(table if len(table) > 2 else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="types to run [default: all]")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.types) - set(model_types())):
        parser.error(f"transformers has no causal language model type {', '.join(unknown)}")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    outcomes = {}
    for name in options.types or model_types():
        outcomes[name] = outcome_of(name)
        print(f"{name:32}{outcomes[name].kind:12}{outcomes[name].words[:120]}", file=sys.stderr, flush=True)
    if not options.types:
        write_text(PAGE, page(outcomes))
    counts = Counter(outcome.kind for outcome in outcomes.values())
    print(json.dumps(counts))
    return 1 if counts["differs"] or counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
