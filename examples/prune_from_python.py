"""Prune a model with documents that are in memory, one participant for each file that is named.

python examples/prune_from_python.py MODEL north.txt south.txt --out run
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedprllm import Documents, PruneConfig, PruneResult, prune


def documents(path: Path) -> Any:
    """One participant's documents, here the paragraphs of a file.

    A `datasets.Dataset` with a column ``text`` is accepted as it is, whatever it was made from. Where that
    package is not installed, `Documents` takes any strings.
    """
    paragraphs = path.read_text(encoding="utf-8").split("\n\n")
    if find_spec("datasets") is None:
        return Documents(paragraphs)
    from datasets import Dataset

    return Dataset.from_dict({"text": paragraphs})


def show(result: PruneResult) -> None:
    """What the votes say, and how far participants agree."""
    print(f"the pruned model: {result.model_dir}")
    for name, votes in list(result.votes.items())[:3]:
        everybody = (votes == votes.max()).float().mean()
        print(f"{name}: {result.sparsity[name]:.1%} zeros; {everybody:.1%} of the weights have every vote")


def main() -> None:
    """Read the arguments, prune, and show the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("texts", nargs="+", type=Path, help="one text file for each participant")
    parser.add_argument("--out", default="run", help="folder of the run")
    parser.add_argument("--windows", type=int, default=4, help="calibration windows for each participant")
    parser.add_argument("--window-length", type=int, default=128, help="tokens in a window")
    args = parser.parse_args()

    participants = {path.stem: documents(path) for path in args.texts}
    config = PruneConfig(sparsity=0.5, windows=args.windows, window_length=args.window_length)
    show(prune(args.model, participants, config, out=args.out))


if __name__ == "__main__":
    main()
