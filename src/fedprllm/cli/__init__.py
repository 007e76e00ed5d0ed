"""The command line."""

from fedprllm.cli.app import main

__all__ = ["main"]
