"""What all tests share: tiny models of many architectures, and the reference data beside the checkout."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

# Shapes written in annotations are checked while testing, and only then.
from jaxtyping import install_import_hook

_hook = install_import_hook("fedprllm.core", "beartype.beartype")

import torch  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from tests.isolation import process_state  # noqa: E402
from tests.models import ARCHITECTURES, save_tiny  # noqa: E402

transformers_logging.disable_progress_bar()
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data, beside the checkout of developers and of CI only."""
    if not SHARED.is_dir():
        if os.environ.get("FEDPRLLM_REQUIRE_SHARED"):
            pytest.fail(f"no reference data at {SHARED}, and FEDPRLLM_REQUIRE_SHARED is set")
        pytest.skip("no reference data (../shared) beside this checkout")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Iterator[None]:
    before = process_state()
    yield
    after = process_state()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test changed what later tests depend on (before, after): {changed}"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """``tiny("llama")`` is a folder with a tiny random model of that architecture, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("tiny") / name
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save_tiny(ARCHITECTURES[name], folder)
            made[name] = folder
        return made[name]

    return get


@pytest.fixture
def windows():
    """``windows(participant, n)``: different random token windows of 16 tokens for each participant."""

    def get(participant: int, n: int = 2, length: int = 16) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + participant)
        return torch.randint(4, 128, (n, length), generator=generator)

    return get
