"""What checkpoints of a full-parameter state cost the steps, and whether memory stays flat over many of them.

`steps` trains every weight of a small Gemma 3 without checkpoints, with those that are written in the background, and
with the same ones waited for; the sides take turns. `soak` runs thousands of tiny steps on several processes with a
checkpoint every 50, and tells each process's memory on the way.
Command: `python -m tests.benchmarks.bench_checkpoint steps`, `python -m tests.benchmarks.bench_checkpoint soak`
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from tests.support.processes import Job, tiny_project


def sides(preset: Path, steps: int, every: int) -> dict[str, Callable[[], tuple[float, float]]]:
    """Return for each side a function that gives the seconds of a step, waits for checkpoints included, and of one."""
    from stages.core.finetune import trainer
    from stages.core.finetune.checkpoint import Store
    from tests.support.tiny_models import load_tiny, sequences
    from tests.support.tiny_runs import settings

    class Waiting(Store):
        """Checkpoints that a step waits for."""

        def save(self, *given: object) -> None:
            super().save(*given)
            self.finish()

    given = {"train": sequences(2 * steps, 64), "validation": sequences(2, 64, seed=1)}
    wanted = settings(rank=0, batch_size=2, validate_every=10 * steps, checkpoint_every=every)

    def run(kind: type[Store] | None) -> tuple[float, float]:
        store = kind("bench", 2) if kind else None
        history = trainer.fit(load_tiny(preset, (1, 1), rank=0), given, wanted, store=store).history
        if store:
            store.clear()
        waited = history.seconds["checkpoint"]
        seconds = [each for number, each in enumerate(history.step_seconds) if number]
        return (sum(seconds) + waited) / len(seconds), waited / ((steps - 1) // every)

    return {
        "without": lambda: run(None),
        "in the background": lambda: run(Store),
        "waited for": lambda: run(Waiting),
    }


@click.group()
def main() -> None:
    """Measure checkpoints."""


@main.command("steps")
@click.option("--steps", "count", default=41, show_default=True, help="Steps of a run.")
@click.option("--every", default=10, show_default=True, help="Steps between two checkpoints.")
@click.option("--rounds", default=5, show_default=True, help="Runs of each side.")
@click.option("--hidden", default=512, show_default=True, help="Width of the model.")
def of_steps(count: int, every: int, rounds: int, hidden: int) -> None:
    """Time the sides in turns and print medians."""
    from stages.core.sharding import devices
    from tests.support.tiny_presets import write_tiny_preset

    devices.configure("simulated", 1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GEMMA_TUNING_CACHE"] = folder
        preset = write_tiny_preset(Path(folder) / "p", "gemma3", hidden_dim=hidden, intermediate_dim=4 * hidden)
        runs = sides(preset, count, every)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                found[name].append(run())
    for name, each in found.items():
        step, checkpoint = (statistics.median(values) for values in zip(*each, strict=True))
        click.echo(f"{name}: {1e3 * step:.1f} ms per step; a checkpoint held it up for {1e3 * checkpoint:.1f} ms")


def memory(process: int) -> int:
    """Bytes that a process holds."""
    fields = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@main.command()
@click.option("--steps", "count", default=2000, show_default=True, help="Steps of the run.")
@click.option("--processes", default=4, show_default=True, help="Processes.")
def soak(count: int, processes: int) -> None:
    """Train a tiny model for many steps on several processes and print their memory ten times."""
    from tests.support.tiny_presets import write_tiny_preset

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        preset = write_tiny_preset(folder / "preset", "gemma3", num_layers=1, num_key_value_heads=2)
        project = tiny_project(folder / "project", preset)
        out = ["--out-root", str(project / "out"), "--set", "finetune.checkpoint_every=50"]
        out += ["--set", f"finetune.steps={count}", "--set", f"finetune.epochs={count}"]
        cache = {"GEMMA_TUNING_CACHE": str(folder / "cache")}
        with Job(project, "load", *out, count=1, **cache) as job:
            job.done(600)
        told, began = 0, time.monotonic()
        with Job(project, "finetune", *out, count=processes, **cache) as job:
            while job.processes[0].poll() is None:
                newest = max((int(each.name[5:]) for each in folder.glob("cache/checkpoints/*/step-*")), default=0)
                if newest >= told + count // 10:
                    told = newest
                    held = ", ".join(f"{memory(each.pid) / 2**20:.1f}" for each in job.processes)
                    click.echo(f"{time.monotonic() - began:.0f} s, step {newest}: {held} MiB")
                time.sleep(0.1)
            job.done(60)


if __name__ == "__main__":
    main()
