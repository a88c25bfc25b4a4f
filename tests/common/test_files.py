"""Files are whole or not there, as readable as any other of the user's, and told of in two lines when not written."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.core import files
from stages.core.common.paths import MAKERS, OF_VARIANTS, maker_of
from stages.core.load.adapter import save
from stages.core.records.finetune import Sample
from tests.support import warm
from tests.support.repository import ROOT, STAGES, outputs, variants_of


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_an_output_is_as_readable_as_the_users_other_files_and_the_umask_is_left_alone(tmp_path, monkeypatch, mask):
    before = os.umask(mask)
    umask = os.umask
    monkeypatch.setattr(os, "umask", lambda value: pytest.fail(f"the umask was {value} for a moment"))
    try:
        files.write_json(tmp_path / "a.json", {"a": 1})
        save(tmp_path / "a.safetensors", {"a": np.ones(3, "f4")}, {})
        for path in tmp_path.iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path
    finally:
        umask(before)


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("flushed"), fsync(handle)))
    monkeypatch.setattr(Path, "replace", lambda path, target: (done.append("named"), replace(path, target)))
    files.write_text(tmp_path / "a.txt", "text")
    assert done == ["flushed", "named", "flushed"]


def test_a_file_that_does_not_fit_leaves_the_old_one_and_names_the_target(tmp_path):
    target = tmp_path / "a.json"
    files.write_json(target, "before")
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError) as raised:
            files.write_json(target, "x" * 10_000)
        import numpy as np

        with pytest.raises(OSError) as arrays:
            save(tmp_path / "a.safetensors", {"a": np.ones(10_000, "f4")}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert raised.value.filename == str(target)
    assert arrays.value.filename == str(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert files.read_json(target) == "before"
    assert re.fullmatch(
        rf"The disk must have room for {target}\. Received: .*\n.*--out-root.*", files.explain(raised.value)
    )


def test_what_is_kept_is_given_back_only_as_it_was_written(tmp_path):
    path = tmp_path / "kept"
    assert files.read_kept(path) is None
    files.write_kept(path, b"\n content \x00")
    whole = path.read_bytes()
    assert files.read_kept(path) == b"\n content \x00"
    for place in range(len(whole)):
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match="SHA-256"):
            files.read_kept(path)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="SHA-256"):
            files.read_kept(path)


def test_no_samples_make_a_file_that_is_not_empty_since_dvc_would_warn_of_it(tmp_path):
    path = tmp_path / "samples.jsonl"
    Sample.write_lines(path, [])
    assert path.read_text() == "\n"
    Sample.write_lines(path, [Sample(step=step, prompt="p", text="t") for step in (1, 2)])
    assert path.read_text() == "".join(f'{{"step": {step}, "prompt": "p", "text": "t"}}\n' for step in (1, 2))


# --- As a user sees it. ---


def blocked(path: Path) -> Path:
    """A path that nothing can be written to, for root neither: a file stands where its folder would be."""
    path.write_text("a file")
    return path / "below"


def test_an_output_that_cannot_be_written_ends_in_two_lines(tmp_path):
    (tmp_path / "reviews.txt").write_text("\n".join(f"A review of some length, number {i}" for i in range(9)))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    data = ["source=files", "train_file=reviews.txt", "validation=2", "min_characters=1", "take=null"]
    options = [text for each in data for text in ("--set", f"prepare.{each}")]
    command = [warm.python(), "-m", "stages.prepare", *options, "--out-root", str(blocked(tmp_path / "out"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    *_, what, remedy = result.stderr.strip().splitlines()
    assert re.fullmatch(
        rf"Error: It must be possible to read and write {tmp_path}/out\S*\. Received: Not a directory", what
    )
    assert "--out-root" in remedy


SHADOW = """
import sys
class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name in ("jax", "keras", "pandas", "tensorflow"):
            sys.exit("it began to work")
sys.meta_path.insert(0, Heavy())
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("relative, command", MAKERS.items())
def test_a_stage_that_could_not_write_an_output_ends_in_two_lines_before_it_works(relative, command, tmp_path):
    name = command
    options = ["--variant", "tuned"] if command in OF_VARIANTS else []
    # A file where the output's folder would be (`models` and `data` themselves hold those of other stages).
    folder = tmp_path / (Path(relative).parent if Path(relative).suffix else Path(*Path(relative).parts[:2]))
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file")
    command = [sys.executable, "-c", SHADOW, f"stages.{name}", *options, "--out-root", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    what, remedy = result.stderr.strip().splitlines()
    assert what == f"Error: It must be possible to read and write {folder}. Received: Not a directory"
    assert "--out-root" in remedy


def test_the_makers_write_all_that_dvc_knows_of():
    for name in STAGES:
        written_for = variants_of(name)
        expected = {f"python -m stages.{name}" + (f" --variant {each}" if each else "") for each in written_for}
        assert {maker_of(path) for path in outputs(name)} == expected


WITHOUT_HOME = """
import pwd, runpy, sys
def nobody(number): raise KeyError(number)
pwd.getpwuid = nobody
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def without_home(module: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user whom the system does not know, as in a container."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("HOME", "GEMMA_TUNING_CACHE", "XDG_CACHE_HOME")
    }
    command = [warm.python(), "-c", WITHOUT_HOME, module, *arguments]
    given = {**kept, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True)


def test_a_user_without_a_home_is_told_to_name_the_cache_folder_and_then_it_runs(tmp_path):
    told = without_home("stages.cache", cwd=tmp_path)
    assert told.returncode == 1
    assert len(told.stderr.strip().splitlines()) == 2, told.stderr
    assert "GEMMA_TUNING_CACHE" in told.stderr
    arguments = ("--dry-run", "--preset", "gemma3_270m")
    ran = without_home("stages.load", *arguments, cwd=ROOT, GEMMA_TUNING_CACHE=str(tmp_path / "cache"))
    assert ran.returncode == 0, ran.stderr
