"""Seconds from a fault in one of several processes to the end of all others: `python -m tests.benchmarks.bench_faults`.

Processes share a small program (tests/support/small_process.py) on this machine's CPU.
"""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path

import click

from tests.support.processes import Job

SIGNALS = {"killed": (signal.SIGKILL, 1), "coordinator killed": (signal.SIGKILL, 0), "stopped": (signal.SIGSTOP, 1)}
SIGNALS["coordinator stopped"] = (signal.SIGSTOP, 0)
FAULTS = {"exception": "raise:1", "not a number": "diverge:1", "disk full": "disk:0"}


def seconds(name: str, count: int, folder: Path) -> tuple[float, list[int | None]]:
    """The time that a fault took to end all, and their exit codes."""
    which, victim = SIGNALS.get(name, (None, None))
    environment = {"FAULT": FAULTS[name]} if name in FAULTS else {}
    with Job(folder, "small_process", count=count, module="tests.support", **environment) as job:
        job.until(0, "five steps")
        began = time.monotonic()
        if which is not None:
            job.signal(victim, which)
        codes = job.codes(besides=victim, seconds=120)
        return time.monotonic() - began, [code for number, code in enumerate(codes) if number != victim]


@click.command()
@click.option("--count", default=2, show_default=True, help="Processes.")
@click.option("--times", default=10, show_default=True, help="How often each fault is made.")
def main(count: int, times: int) -> None:
    """Print a line a fault."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (*SIGNALS, *FAULTS):
            found = [seconds(name, count, Path(folder)) for _ in range(times)]
            took = sorted(each for each, _ in found)
            codes = {code for _, each in found for code in each}
            click.echo(f"{name}: {took[0]:.1f} to {took[-1]:.1f} s, {times} times, exit codes {codes}")


if __name__ == "__main__":
    main()
