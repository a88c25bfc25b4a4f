"""The stage and the module's functions in processes of their own, led to a Hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from stages.core.common.paths import MANIFEST
from stages.core.presets.manifest import read_manifest
from tests.support import warm
from tests.support.hub_files import PLAIN, PRESET, REPO
from tests.support.repository import ROOT
from tests.support.servers import hub_server


def named(text, endpoint):
    """Put the usual name for that of the server, in a message or a check."""
    return text.replace(f"{endpoint.partition('//')[2]} (HF_ENDPOINT)", "Hugging Face")


@pytest.fixture
def hub():
    with hub_server.serving(hub_server.Hub(REPO, dict(PLAIN), cardData={"license": "gemma"})) as running:
        yield running


@pytest.fixture
def fetch(hub, tmp_path):
    """Return a function that runs the stage as a user does, against the server and with an empty home."""

    def run(preset=PRESET, **environment):
        command = [warm.python(), "-m", "stages.fetch", "--out-root", tmp_path / "out"]
        command += ["--set", "fetch.source=huggingface", "--set", f"fetch.preset={preset}"]
        settings = hub_server.hub_environment(hub.url, tmp_path / "home")
        settings["GEMMA_TUNING_CACHE"] = str(tmp_path / "cache")
        environment = os.environ | settings | {key: str(value) for key, value in environment.items()}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        run.stderr = named(run.stderr, environment["HF_ENDPOINT"])
        return run

    return run


@pytest.fixture
def ask(hub, tmp_path):
    """Return a function that calls one of the module's functions in such a process; it returns what came, or was said.

    The client reads its environment once, when it is imported.
    """

    def run(function, preset=PRESET, **environment):
        code = (
            "import dataclasses, json, sys; from pathlib import Path; from stages.core.common import errors\n"
            f"from stages.core.fetch.huggingface import {function}\n"
            f"try: print(json.dumps(dataclasses.asdict({function}({preset!r}, Path({str(tmp_path / 'cache')!r})))))\n"
            "except errors.StageError as error: print(json.dumps(str(error)))"
        )
        environment = os.environ | hub_server.hub_environment(hub.url, tmp_path / "home") | environment
        done = subprocess.run(
            [warm.python(), "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(named(done.stdout, environment["HF_ENDPOINT"]))

    return run


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """Return a function that reads the manifest that was written."""
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path / "cache"))
    return lambda: read_manifest(tmp_path / "out" / MANIFEST)
