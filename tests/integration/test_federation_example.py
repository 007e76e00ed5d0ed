"""The example of a federation in one script, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.library_text import library_text

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "federation_in_one_script.py"


@pytest.mark.federation
def test_a_federation_in_one_script_gives_the_model_of_one_process(small_model, tmp_path):
    prose = library_text("prose")
    texts = [tmp_path / f"{name}.txt" for name in ("north", "south")]
    for number, text in enumerate(texts):
        text.write_text(prose[6000 * number : 6000 * (number + 1)], encoding="utf-8")
    words = [small_model, *texts, "--out", tmp_path / "out", "--windows", "2", "--window-length", "32"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "0 parameters differ"
    assert done.stdout.count("the same model") == len(texts)
