"""Each stage by itself, as a user types it: help at once, mistakes in a line, the right exit code."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from stages.core.cli import records_on_standard_error
from tests.support.repository import ROOT

# `profile` changes settings and `cache` cleans up: tests/config/test_profiles.py, tests/cache/test_cache.py.
COMMANDS = ("cache", "profile")
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[a-z]*.py") if path.stem not in COMMANDS)
VARIANTS = {"generate": ["--variant", "baseline"], "evaluate": ["--variant", "baseline"]}
HEAVY = ("tensorflow", "jax", "keras", "keras_hub", "pandas", "numpy")


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository (or a copy of it)."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def imported_by(stage: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a stage and return its end and which heavy packages it had imported by then, which it tells last."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{stage}', *{list(arguments)!r}]\n"
        f"try: runpy.run_module('stages.{stage}', run_name='__main__')\n"
        "except SystemExit as end: status = end.code or 0\n"
        f"print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules])\n"
        "sys.exit(status)\n"
    )
    result = run("-c", code)
    return result, set(result.stdout.split("HEAVY")[1].split())


@pytest.mark.parametrize("stage", STAGES)
def test_help_imports_nothing_heavy_and_says_what_the_stage_does(stage: str):
    result, heavy = imported_by(stage, "--help")
    assert (result.returncode, heavy) == (0, set())
    assert "--set" in result.stdout
    assert "--out-root" in result.stdout
    assert len(result.stdout.splitlines()[2].strip()) > 20


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_setting_ends_with_exit_code_2_before_anything_heavy(stage: str):
    result, heavy = imported_by(stage, *VARIANTS.get(stage, []), "--set", "finetune.rank=four")
    assert (result.returncode, heavy) == (2, set())
    assert result.stderr.strip() == (
        "Invalid setting: --set: finetune.rank must be a valid integer. Received: finetune.rank='four'"
    )


def test_a_wrong_option_ends_with_exit_code_2():
    assert run("-m", "stages.load", "--meshes").returncode == 2
    unknown = run("-m", "stages.generate", "--variant", "neither", "--set", "variants.mine=adapters/mine")
    assert unknown.returncode == 2
    assert "must be one of baseline, tuned, mine. Received: --variant=neither" in unknown.stderr
    for options, told in (([], "--variant"), (["--chat", "--prompt", "So"], "--chat")):
        result = run("-m", "stages.generate", *options)
        assert result.returncode == 2
        assert told in result.stderr.splitlines()[-1]


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


COMMANDS = [*STAGES, "profile"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without any package, not even pip."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", symlinks=True)
    return folder / "venv" / "bin" / "python"


def one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command ended with one line for the user, which has these words, after saying at most what it does."""
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.removeprefix("Loading the model into its shards ...\n").splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("stage", COMMANDS)
def test_without_the_packages_one_line_says_what_to_do(bare: Path, stage: str):
    for command in (["-m", f"stages.{stage}"], [f"stages/{stage}.py"]):
        result = subprocess.run([bare, *command], cwd=ROOT, capture_output=True, text=True)
        one_line(result, str(bare), "make venv", "activate")


def test_a_package_built_for_another_python_is_told_in_a_line(bare: Path, tmp_path: Path):
    (tmp_path / "click.py").write_text("")
    (tmp_path / "pydantic.py").write_text("raise ImportError('pydantic_core: wrong ELF class')")
    command = [bare, "-m", "stages.load"]
    result = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    one_line(result, "wrong ELF class")


@pytest.mark.parametrize(
    "name, value, word",
    [
        ("version_info", (3, 10, 13), "3.10.13"),
        ("version_info", (3, 14, 0), "3.14.0"),
        ("version_info", (2, 7, 18), "2.7.18"),
        ("platform", "win32", "WSL 2"),
    ],
)
def test_another_python_or_system_ends_at_once_in_a_line(name: str, value: object, word: str):
    one_line(run("-c", f"import sys; sys.{name} = {value!r}; import stages.load"), word)


def test_the_check_names_the_versions_that_make_takes():
    for text in ((ROOT / "stages/__init__.py").read_text(), (ROOT / "Makefile").read_text()):
        assert "(3, 11) <= sys.version_info < (3, 14)" in text


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_stage_run_as_a_file_works(stage: str):
    result = run(f"stages/{stage}.py", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: {stage}.py ")


def test_a_python_built_without_a_module_of_its_own_is_not_told_to_install_it():
    code = "import sys, runpy; sys.modules['resource'] = None; sys.argv = ['load']; "
    code += "runpy.run_module('stages.load', run_name='__main__')"
    one_line(run("-c", code), "was built without its own module resource")


def test_peak_memory_on_macos_is_in_bytes_already_and_its_growth_is_not_told(tmp_path: Path):
    code = (
        "import sys, pathlib\nfrom stages.core.common import host_memory\nlinux = host_memory.peak_host_bytes()\n"
        f"sys.platform = 'darwin'; host_memory.PROCESS = pathlib.Path({str(tmp_path / 'none')!r})\n"
        "assert linux / 2000 < host_memory.peak_host_bytes() < linux / 500, linux\n"
        "assert host_memory.Growth().bytes() is None"
    )
    assert run("-c", code).returncode == 0


def test_ctrl_c_while_a_command_still_imports_ends_it_without_a_word(tmp_path: Path):
    (tmp_path / "click.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    command, environment = [sys.executable, "-m", "stages.load"], {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_in_a_command_that_runs_ends_it_with_130_and_a_word(tmp_path: Path):
    (tmp_path / "resource.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    command, environment = [sys.executable, "-m", "stages.load"], {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (
        130,
        "",
        "Loading the model into its shards ...\nInterrupted.\n",
    )


def test_what_the_stages_log_is_shown_once_and_bare_and_nothing_else_is(capsys: pytest.CaptureFixture[str]):
    loggers = [logging.getLogger(name) for name in ("stages.core.files", "keras", "jax")]
    with records_on_standard_error():
        for logger in loggers:
            logger.debug("detail")
            logger.info("100% {done}")
        loggers[0].warning("beware")
    loggers[0].info("after the command")
    assert capsys.readouterr() == ("", "100% {done}\nWarning: beware\n")


def test_git_that_makes_crlf_leaves_every_text_as_it_is(tmp_path: Path):
    """DVC compares the bytes of code and settings; with CRLF every stage would be changed."""
    git = ["git", "-c", "user.name=Test", "-c", "user.email=test@localhost"]
    for name in (".gitattributes", "params.yaml", "dvc.yaml", "stages/load.py"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes((ROOT / name).read_bytes())
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "Some texts"]):
        subprocess.run([*git, *command], cwd=tmp_path / "a", check=True)
    clone = ["git", "clone", "-q", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", "a", "b"]
    subprocess.run(clone, cwd=tmp_path, check=True)
    for name in ("params.yaml", "dvc.yaml", "stages/load.py"):
        assert (tmp_path / "b" / name).read_bytes() == (ROOT / name).read_bytes()
