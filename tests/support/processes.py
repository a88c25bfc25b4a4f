"""Real processes of one run, each as a launcher would start it, on a tiny project."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from tests.support import warm
from tests.support.copies import change
from tests.support.repository import ROOT
from tests.support.tiny_presets import tiny_reviews

OF_A_LAUNCHER = ("SLURM_", "OMPI_", "TPU_", "KAGGLE_", "KUBERNETES_", "COORDINATOR_", "NUM_PROCESSES", "PROCESS_ID")


def tiny_project(folder: Path, preset: Path) -> Path:
    """A folder in which `load` may run: settings on a tiny scale, a tiny preset, and its tokens."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "reviews.txt").write_text("\n".join(review.replace("\n", " ") for review in tiny_reviews(24)) + "\n")
    change(folder, "fetch", source="path", preset="tiny", path=str(preset))
    change(folder, "prepare", source="files", train_file="reviews.txt", validation=4, min_characters=1)
    change(folder, "tokenize", length=32)
    change(folder, "mesh", shape=[2, 2], devices="simulated")
    change(folder, "finetune", batch_size=4, steps=6, learning_rate=0.01, schedule="constant", warmup_steps=0)
    change(folder, "finetune", sample_every=None, sample_tokens=4, checkpoint_every=2)
    change(folder, "generate", max_tokens=4, prompts=["This movie was", "The best"])
    before = Path.cwd()
    os.chdir(folder)
    try:
        for stage in ("fetch", "prepare", "tokenize"):
            done = CliRunner().invoke(import_module(f"stages.{stage}").main, [])
            assert done.exit_code == 0, (stage, done.output, done.exception)
    finally:
        os.chdir(before)
    return folder


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("localhost", 0)) as listener:
        return listener.getsockname()[1]


class Job:
    """Processes of one run of a stage; leaving the `with` block kills what is left of them."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        *arguments: str,
        count: int = 2,
        each: dict[int, Any] | None = None,
        module: str = "stages",
        **environment: str,
    ):
        """Start them. `each`: environment or arguments (a list) of single ones, by their numbers.

        Stages are forked (see tests/support/warm): what is stopped or killed as a process has another `module`.
        """
        python = warm.python() if module == "stages" else sys.executable
        self.logs = [folder / f"{stage}-{count}-{number}.log" for number in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []
        own = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_LAUNCHER)}
        address = f"localhost:{free_port()}"
        for number, log in enumerate(self.logs):
            given = (each or {}).get(number, {})
            joining = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(count), "PROCESS_ID": str(number)}
            path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
            variables = {**own, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
            variables |= (joining if count > 1 else {}) | given.get("environment", {})
            command = [python, "-m", f"{module}.{stage}", *arguments, *given.get("arguments", [])]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def text(self, number: int) -> str:
        """What a process has said so far."""
        return self.logs[number].read_text(errors="replace")

    def until(self, number: int, said: str, seconds: float = 90) -> None:
        """Wait until a process says something."""
        deadline = time.monotonic() + seconds
        while said not in self.text(number):
            assert time.monotonic() < deadline, (said, self.text(number)[-2000:])
            assert self.processes[number].poll() is None, (said, self.text(number)[-2000:])
            time.sleep(0.05)

    def signal(self, number: int, which: signal.Signals) -> None:
        """Send a process a signal."""
        self.processes[number].send_signal(which)

    def codes(self, *, besides: int | None = None, seconds: float = 90) -> list[int | None]:
        """The exit codes of all, once they have ended; None for the one that is not waited for."""
        deadline = time.monotonic() + seconds
        waited = [each for number, each in enumerate(self.processes) if number != besides]
        for process in waited:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError([self.text(number)[-1500:] for number in range(len(self.logs))]) from None
        return [process.poll() for process in self.processes]

    def done(self, seconds: float = 90) -> Job:
        """Wait until all have ended well."""
        codes = self.codes(seconds=seconds)
        assert codes == [0] * len(codes), [self.text(number)[-2500:] for number in range(len(self.logs))]
        return self
