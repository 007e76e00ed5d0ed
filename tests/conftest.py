"""What all tests share: tiny models of many architectures, and the reference data beside the checkout."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

# Libraries and tests are made to stay: they are not searched for garbage while they are imported, nor later.
gc.disable()

# Shapes written in annotations are checked while testing, and only then.
import tests.shape_checks  # noqa: E402

tests.shape_checks.install()

import torch  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from tests.isolation import process_state  # noqa: E402
from tests.models import ARCHITECTURES, MIXTURES, save_tiny  # noqa: E402

transformers_logging.disable_progress_bar()
SHARED = Path(__file__).resolve().parents[2] / "shared"


LONGEST = [
    "test_federation_flare.py",
    "test_federation_kills.py",
    "test_secure_processes.py",
    "test_federation_rehearsal.py",
]
SMALL_MODEL = Path(__file__).parent / "fixtures" / "small-model"


def _rank(name: str) -> int:
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Check the mark `shared`, and put the real engine first: the other worker does the rest meanwhile.

    Reference data may only add to the tests, and what it adds is marked.
    """
    items.sort(key=lambda item: (item.get_closest_marker("federation") is None, _rank(item.path.name)))
    for item in items:
        needs = "shared" in getattr(item, "fixturenames", ())
        if needs != (item.get_closest_marker("shared") is not None):
            raise pytest.UsageError(f"{item.nodeid}: the fixture and the mark `shared` belong together")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def small_model() -> Path:
    """A trained Llama of 260,032 parameters with its tokenizer; `tests/make_small_model.py` made it."""
    return SMALL_MODEL


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data, beside the checkout of developers and of CI only.

    FEDPRLLM_NO_SHARED=1 hides it, so that one sees what a public clone tests.
    """
    if os.environ.get("FEDPRLLM_NO_SHARED"):
        pytest.skip("FEDPRLLM_NO_SHARED hides the reference data (../shared)")
    if not SHARED.is_dir():
        if os.environ.get("FEDPRLLM_REQUIRE_SHARED"):
            pytest.fail(f"no reference data at {SHARED}, and FEDPRLLM_REQUIRE_SHARED is set")
        pytest.skip("no reference data (../shared) beside this checkout")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models this small gain nothing from more, and wait for each other where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test survives a power failure, and flushing takes a third of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


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
                save_tiny((ARCHITECTURES | MIXTURES)[name], folder)
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
