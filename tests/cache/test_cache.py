"""What lies in the cache folder: damaged programs are made anew, and leftovers are shown and removed when asked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from stages.cache import main
from stages.core.finetune import resuming
from stages.core.finetune.checkpoint import Store, lock_of
from tests.support import warm
from tests.support.kept import keep
from tests.support.repository import ROOT

PROGRAM = """
import sys, warnings
from stages.core.cli import records_on_standard_error
from stages.core.sharding import devices
hits = []
def count(name, **more):
    if name.endswith("cache_hits"):
        hits.append(name)
with records_on_standard_error():
    devices.configure("simulated", 1)
    import jax
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.monitoring.register_event_listener(count)
    print(float(jax.jit(lambda x: (x * 3 + 1).sum())(jax.numpy.ones(5))), "kept" if hits else "compiled")
"""


def compile_something(cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GEMMA_TUNING_CACHE": str(cache)}
    return subprocess.run([warm.python(), "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_damaged_program_is_noticed_compiled_anew_and_replaced(tmp_path: Path):
    assert compile_something(tmp_path).stdout == "20.0 compiled\n"
    programs = sorted((tmp_path / "xla").glob("*.program"))
    assert programs
    for damage in ("cut", "changed", "empty"):
        for path in programs:
            content = path.read_bytes()
            middle = len(content) // 2
            changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            path.write_bytes({"cut": content[:-9], "changed": changed, "empty": b""}[damage])
        again = compile_something(tmp_path)
        assert again.stdout == "20.0 compiled\n"
        assert again.stderr.splitlines() == [
            "Warning: a compiled program in the cache folder is damaged and is compiled again."
        ] * len(programs)
        assert all(len(path.read_bytes()) > 100 for path in programs)
    last = compile_something(tmp_path)
    assert (last.stdout, last.stderr) == ("20.0 kept\n", "")


def test_a_cache_folder_that_cannot_be_written_to_costs_a_line(tmp_path: Path):
    (tmp_path / "file").write_text("in the place of a folder")
    result = compile_something(tmp_path / "file" / "cache")
    assert result.stdout == "20.0 compiled\n"
    (line,) = result.stderr.splitlines()
    assert line.startswith("Warning: compiled programs are not kept for later (")
    assert "GEMMA_TUNING_CACHE" in line


# --- Leftovers. ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with what old, killed and running runs leave, and a download."""
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path))
    for run in ("old", "new"):
        keep(Store(run, keep=2), 5, {"a": np.ones(4, "f4")})
    half = tmp_path / "checkpoints/new/.writing-abc/arrays.safetensors"
    names = ("plans/old", "plans/new", "xla/old-cache", "xla/.half.1", "presets/p")
    for path in (half, *(tmp_path / name for name in names)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content")
    past = time.time() - 20 * 24 * 3600
    for path in [*tmp_path.rglob("*old*"), *tmp_path.glob("checkpoints/old/**/*"), tmp_path / "xla/.half.1"]:
        os.utime(path, (past, past))
    return tmp_path


def run(*arguments: str) -> tuple[set[str], str]:
    """Run the command, and return what it names and its last line."""
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    *_, last = result.stderr.splitlines()
    return {line.split(": ")[-1] for line in result.stdout.splitlines()}, last


LEFT = {"checkpoints/old", "checkpoints/new/.writing-abc", "plans/old", "xla/old-cache", "xla/.half.1"}


def test_leftovers_are_shown_and_go_only_when_asked(cache: Path, logged):
    before = sorted(cache.rglob("*"))
    shown, last = run()
    assert shown == LEFT
    assert last.startswith("5 leftovers, ") and "--remove" in last
    assert sorted(cache.rglob("*")) == before, "showing changes nothing"
    removed, last = run("--remove")
    assert removed == LEFT and last.startswith("Removed 5 leftovers, ")
    assert not any((cache / name).exists() for name in LEFT)
    assert (cache / "plans/new").exists() and (cache / "presets/p").exists()
    assert resuming.newest(Store("new", keep=2)).step == 5
    assert logged() == []
    assert run()[0] == set()


def test_all_but_downloads_goes_with_no_days(cache: Path):
    run("--remove", "--days", "0")
    assert {path.relative_to(cache).parts[0] for path in cache.rglob("*") if path.is_file()} == {"presets"}


HOLD = """
import sys
from stages.core.finetune.checkpoint import Store
store = Store("old", keep=2)
store.hold()
print("held", flush=True)
sys.stdin.read()
"""


def test_the_checkpoints_of_a_run_that_goes_on_stay(cache: Path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert run("--remove", "--days", "0")[0].isdisjoint({"checkpoints/old", "checkpoints/old.lock"})
        assert (cache / "checkpoints/old/step-00000005").is_dir()
        other.kill()
        other.communicate()
    assert "checkpoints/old" in run("--remove", "--days", "0")[0]
    assert not list((cache / "checkpoints").iterdir())
    assert not lock_of(cache / "checkpoints/old").is_locked


def test_help_is_fast_and_a_cache_that_is_not_there_has_nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "import sys, stages.cache; sys.exit(bool({'jax', 'numpy', 'keras'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path / "none"))
    assert run()[0] == set()
