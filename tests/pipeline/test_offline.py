"""Once fetched, the stages that can use a network do not: every attempt of the process to reach one ends it."""

from __future__ import annotations

import os
import subprocess

import pytest

from stages.core.common.paths import MANIFEST
from stages.core.fetch.kaggle import fetch_kaggle
from stages.core.presets.manifest import read_manifest, verified_folder
from tests.support import warm
from tests.support.repository import REAL_CACHE, ROOT
from tests.support.servers import kaggle_server
from tests.support.servers.kaggle_server import HANDLE

REFUSING = """
import runpy, subprocess, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto") or (
        event == "subprocess.Popen" and "pip" in arguments[1]
    ):
        raise SystemExit(f"the network was used: {event} {arguments}")

sys.addaudithook(refuse)
runpy.run_module("stages." + sys.argv.pop(1), run_name="__main__")
"""
FROM_KAGGLE = ["--set", "fetch.source=kaggle", "--set", f"fetch.preset={HANDLE}"]


def offline(stage, out, *arguments, **environment):
    """Run a stage that may not use the network; pip, which works for it in a process of its own, counts as such."""
    command = [warm.python(), "-c", REFUSING, stage, "--out-root", str(out), *arguments]
    environment = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    with kaggle_server.for_this_process(tmp_path, monkeypatch) as running:
        yield running


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_with_a_full_cache_a_preset_of_kaggles_touches_no_network(kaggle, tmp_path, check):
    fetch_kaggle(HANDLE, tmp_path / "cache")
    kaggle.requests.clear()
    run = offline("fetch", tmp_path / "out", *FROM_KAGGLE, *check)
    assert run.returncode == 0, run.stderr
    assert kaggle.requests == []
    if not check:
        assert verified_folder(read_manifest(tmp_path / "out" / MANIFEST), ROOT).is_dir()


def test_with_an_empty_cache_the_refusal_is_a_real_one(kaggle, tmp_path):
    for arguments in (FROM_KAGGLE, []):
        run = offline("fetch", tmp_path / "out", *arguments)
        assert run.returncode == 1
        assert "the network was used" in run.stderr


def test_the_default_preset_and_reviews_touch_no_network_once_here(real_gguf, tmp_path):
    cache = {"GEMMA_TUNING_CACHE": str(REAL_CACHE)}
    first = [warm.python(), "-m", "stages.prepare", "--out-root", str(tmp_path / "first")]
    fetched = subprocess.run(first, cwd=ROOT, env=os.environ | cache, capture_output=True, text=True, timeout=300)
    if fetched.returncode:
        pytest.skip(f"needs the real reviews, and they cannot be fetched here: {fetched.stderr[-300:]}")
    for stage, *arguments in (["fetch"], ["fetch", "--check"], ["prepare"]):
        run = offline(stage, tmp_path / "out", *arguments, **cache)
        assert run.returncode == 0, run.stderr
