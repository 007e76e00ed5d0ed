"""``python -m fedprllm``: the command line."""

from __future__ import annotations

from fedprllm.cli import main

if __name__ == "__main__":
    main()
