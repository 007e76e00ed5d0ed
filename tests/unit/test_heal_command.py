"""The command ``heal``, and ``prune --heal``: options, places and what is printed."""

from __future__ import annotations

from tests.unit.test_cli import given, run, words  # noqa: F401  given is a fixture
