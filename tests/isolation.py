"""Keep tests from changing the process state: helpers restore it, and a leftover change fails the test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(n_threads: int) -> Iterator[None]:
    """Set torch's number of threads inside the ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def process_state() -> dict[str, object]:
    """Process-wide state that would affect later tests."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return {
        "environment": environment,
        "working directory": os.getcwd(),  # noqa: PTH109  a string, to compare
        "threads of torch": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
    }
