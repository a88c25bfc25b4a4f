"""What all tests share: a cache of their own, eight simulated devices in this process, and tiny models."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.core.paths import cache_folder

ROOT = Path(__file__).parent.parent
FAMILIES = ("gemma", "gemma2", "gemma3")
DEVICES = 8

# The real weights may be there already; tests on tiny models must not write beside them.
REAL_CACHE = cache_folder()


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a cache folder of its own, compiled programs included."""
    folder = tempfile.mkdtemp(prefix="gemma-tuning-tests-")
    config.stash[_CACHE] = folder
    os.environ["GEMMA_TUNING_CACHE"] = folder


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing behind."""
    shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


_CACHE = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def devices() -> int:
    """Set this process up for eight simulated devices, once."""
    from stages.core.devices import configure

    configure("simulated", DEVICES)
    return DEVICES


@pytest.fixture(scope="session")
def presets(devices: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny preset folder of each Gemma family."""
    from tests.tiny import write_tiny_preset

    base = tmp_path_factory.mktemp("presets")
    return {family: write_tiny_preset(base / family, family) for family in FAMILIES}


@pytest.fixture(autouse=True)
def no_distribution_left() -> Iterator[None]:
    """A model under test sets Keras' global distribution; the next test starts without one."""
    yield
    if "keras" in sys.modules:
        sys.modules["keras"].distribution.set_distribution(None)


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The embedded model's file, if the person has fetched it."""
    found = sorted(REAL_CACHE.glob("presets/*/gemma-3-270m-q4_k_m.gguf"))
    if not found:
        pytest.skip("needs the real weights: run `python -m stages.fetch` first")
    return found[0]
