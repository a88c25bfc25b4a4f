"""Each stage by itself, as a person types it: help at once, mistakes in a line, the right exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# `profile` changes settings and `cache` cleans up: tests/test_profile.py, tests/test_cache.py.
COMMANDS = ("cache", "profile")
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[a-z]*.py") if path.stem not in COMMANDS)
VARIANTS = {"generate": ["--variant", "baseline"], "evaluate": ["--variant", "baseline"]}
HEAVY = ("tensorflow", "jax", "keras", "keras_hub", "pandas", "numpy")


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository (or a copy of it)."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def imported_by(stage: str, *arguments: str) -> tuple[int, set[str]]:
    """Run a stage and return its exit code and which heavy packages it had imported when it ended."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{stage}', *{list(arguments)!r}]\n"
        f"try: runpy.run_module('stages.{stage}', run_name='__main__')\n"
        "except SystemExit as end: status = end.code or 0\n"
        f"print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules])\n"
        "sys.exit(status)\n"
    )
    result = run("-c", code)
    return result.returncode, set(result.stdout.split("HEAVY")[1].split())


@pytest.mark.parametrize("stage", STAGES)
def test_help_imports_nothing_heavy_and_says_what_the_stage_does(stage: str):
    assert imported_by(stage, "--help") == (0, set())
    shown = run("-m", f"stages.{stage}", "--help").stdout
    assert "--set" in shown
    assert "--out-root" in shown
    assert len(shown.splitlines()[2].strip()) > 20


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_setting_ends_with_exit_code_2_before_anything_heavy(stage: str):
    arguments = [*VARIANTS.get(stage, []), "--set", "finetune.rank=four"]
    assert imported_by(stage, *arguments) == (2, set())
    result = run("-m", f"stages.{stage}", *arguments)
    assert result.stderr.strip() == (
        "Wrong setting: --set: finetune.rank must be a valid integer. Received: finetune.rank='four'"
    )


def test_a_wrong_option_ends_with_exit_code_2():
    assert run("-m", "stages.load", "--meshes").returncode == 2
    assert run("-m", "stages.generate", "--variant", "neither").returncode == 2


def test_a_missing_input_names_the_stage_that_makes_it_and_ends_with_exit_code_1(tmp_path: Path):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    result = run("-m", "stages.evaluate", "--variant", "tuned", cwd=tmp_path)
    assert result.returncode == 1
    assert "python -m stages." in result.stderr
    assert "Traceback" not in result.stderr
    shown = run("-m", "stages.evaluate", "--variant", "tuned", "-v", cwd=tmp_path)
    assert "Traceback" in shown.stderr


def test_outside_the_repository_the_missing_settings_are_told(tmp_path: Path):
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    result = run("-m", "stages.load", cwd=tmp_path)
    assert result.returncode == 2
    assert "params.yaml" in result.stderr
