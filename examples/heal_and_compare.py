"""Compare what participants can share, and what healing adds, on text that no model was calibrated on.

python examples/heal_and_compare.py MODEL held-out.txt north.txt south.txt --out comparison
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedprllm import HealConfig, PruneConfig, evaluate, heal, prune


def main() -> None:
    """Prune in two ways, heal the better one, and print the perplexities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("held_out", help="text file for measuring")
    parser.add_argument("texts", nargs="+", help="one text file for each participant")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder of the runs")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows for each participant")
    parser.add_argument("--window-length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of healing")
    parser.add_argument("--max-tokens", type=int, default=2048, help="tokens of the held-out text")
    args = parser.parse_args()

    text = {"windows": args.windows, "window_length": args.window_length}
    ways = {
        "votes": PruneConfig(sparsity=0.5, **text),
        "Gram matrices": PruneConfig(sparsity=0.5, share="gram", strategy="iterative", **text),
    }
    models: dict[str, str | Path] = {"dense": args.model}
    for name, config in ways.items():
        models[name] = prune(args.model, args.texts, config, out=args.out / config.share).model_dir
    healing = HealConfig(rounds=args.rounds, **text)
    healed = heal(models["Gram matrices"], args.texts, healing, out=args.out / "healed")
    models["Gram matrices, healed"] = healed.model_dir

    for name, folder in models.items():
        measured = evaluate(
            folder, args.held_out, window_length=args.window_length, max_tokens=args.max_tokens
        )
        print(f"{name:<22} perplexity {measured[0].perplexity:8.2f}")


if __name__ == "__main__":
    main()
