"""The forked Python of tests (tests/support/warm) does what Python does for the process that starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import warm

BOTH = pytest.mark.parametrize("python", [sys.executable, warm.python], ids=["real", "warm"])
TELL = """
import os, sys
print(os.getcwd(), sys.argv, sys.path[0], os.environ["GIVEN"], "TAKEN" in os.environ, sys.stdin.read(), __name__)
print("jax" in sys.modules, file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def started(python, *arguments: str, **options) -> subprocess.Popen[str]:
    executable = python if isinstance(python, str) else python()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([executable, *arguments], **pipes, **options)


@BOTH
def test_folder_arguments_environment_streams_and_exit_code_are_those_of_its_caller(python, tmp_path, monkeypatch):
    monkeypatch.setenv("TAKEN", "no")
    given = {name: value for name, value in os.environ.items() if name != "TAKEN"} | {"GIVEN": "a\nb"}
    run = started(python, "-c", TELL, "3", "x y", cwd=tmp_path, env=given)
    out, err = run.communicate("typed")
    assert out == f"{tmp_path} ['-c', '3', 'x y']  a\nb False typed __main__\n"
    assert (run.returncode, err.strip()) == (3, str(python is warm.python))


@BOTH
def test_a_module_is_the_one_in_its_folder(python, tmp_path):
    (tmp_path / "mine.py").write_text("import sys\nprint(__name__, sys.argv, sys.path[0])\nraise SystemExit('ended')")
    run = started(python, "-m", "mine", "--option", cwd=tmp_path)
    out, err = run.communicate()
    assert (run.returncode, out, err) == (1, f"__main__ ['{tmp_path}/mine.py', '--option'] {tmp_path}\n", "ended\n")


WAIT = "import time; print('here', flush=True); time.sleep(60)"


@BOTH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_reaches_it_and_it_ends_by_that(python, number):
    run = started(python, "-c", WAIT)
    assert run.stdout.readline() == "here\n"
    run.send_signal(number)
    _, err = run.communicate(timeout=20)
    assert run.returncode == -number
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)


def test_several_run_at_once_and_a_variable_that_jax_reads_is_for_a_real_one():
    began = time.monotonic()
    runs = [started(warm.python, "-c", "import time; time.sleep(1)") for _ in range(4)]
    assert [run.wait(20) for run in runs] == [0] * 4
    assert time.monotonic() - began < 10
    environment = {**os.environ, "JAX_ENABLE_X64": "1"}
    run = started(warm.python, "-c", "import sys; print('jax' in sys.modules)", env=environment)
    assert run.communicate()[0] == "False\n"


def test_it_ends_with_the_process_that_started_it(tmp_path: Path):
    code = (
        "import subprocess, sys\nfrom tests.support import warm\n"
        "child = subprocess.Popen([warm.python('dvc'), '-c', 'import os, time; print(os.getpid(), flush=True); "
        "time.sleep(60)'], stdout=subprocess.PIPE, text=True)\n"
        "print(child.stdout.readline(), warm.python('dvc'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid, executable = run.stdout.split()
    until = time.monotonic() + 20
    while (Path(executable).exists() or Path(f"/proc/{pid}").exists()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(executable).exists() and not Path(f"/proc/{pid}").exists()
