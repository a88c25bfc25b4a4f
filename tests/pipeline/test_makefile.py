"""make tells of what it cannot work in, and notices a folder that was moved."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.repository import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The project's Makefile and requirements, as in a ZIP download: no git."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Of the make that may run the tests.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_folder_without_git_is_told_in_a_line_before_anything_is_installed(folder: Path):
    result = make(folder, "repro")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[0].endswith("run `git init` first.")
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("place, anew", [("/elsewhere", True), (None, False)])
def test_an_environment_that_was_made_in_another_folder_is_made_anew(folder: Path, place: str | None, anew: bool):
    (folder / ".venv").mkdir()
    (folder / ".venv/.installed").write_text(f"{place or folder}\n")
    assert ("-m venv --clear .venv" in make(folder, "--dry-run", "venv").stdout) == anew


def test_the_first_environment_and_one_of_older_requirements_clear_nothing(folder: Path):
    assert "-m venv  .venv" in make(folder, "--dry-run", "venv").stdout
    (folder / ".venv").mkdir()
    (folder / ".venv/.installed").write_text(f"{folder}\n")
    os.utime(folder / ".venv/.installed", (1, 1))
    assert "-m venv  .venv" in make(folder, "--dry-run", "venv").stdout
