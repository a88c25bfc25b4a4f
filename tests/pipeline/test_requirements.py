"""requirements.txt installs from wheels on every Python and system that README names; needs uv and a package index."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.support.repository import ROOT

SYSTEMS = ("x86_64-manylinux_2_31", "aarch64-manylinux_2_31", "aarch64-apple-darwin")
UNREACHABLE = ("Failed to fetch", "error sending request", "Could not connect", "offline")


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_pin_has_a_wheel(system: str, version: str):
    if shutil.which("uv") is None:
        pytest.skip("needs uv, which resolves for other systems: pip install uv")
    command = ["uv", "pip", "compile", "--quiet", "--python-platform", system, "--python-version", version]
    # promise, which tensorflow-datasets requires, is pure Python and has no wheel.
    command += ["--only-binary", ":all:", "--no-binary", "promise", "requirements.txt"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode and any(words in result.stderr for words in UNREACHABLE):
        pytest.skip(f"no package index answers: {result.stderr[-200:]}")
    assert result.returncode == 0, result.stderr[-2000:]


def test_pip_is_required_since_the_stages_run_it_and_uv_brings_none():
    assert any(line.startswith("pip==") for line in (ROOT / "requirements.txt").read_text().splitlines())
