"""The command line: one module per group of commands."""

from fedprllm.cli.app import main

__all__ = ["main"]
