"""Fixtures of several files of this folder."""

from __future__ import annotations

from tests.report_pages import edited, run_once

__all__ = ["edited", "run_once"]
