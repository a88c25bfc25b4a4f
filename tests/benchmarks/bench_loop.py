"""What the host adds to a training step: our `fit`, Keras' own, and the compiled step by itself.

The model is so small that the loop is most of what is measured. The sides take turns, round after round; the first
steps of each run, which compile, are left out.
Command: `python -m tests.benchmarks.bench_loop --steps 400 --rounds 5`
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click


def run_sides(preset: Path, steps: int) -> dict[str, Callable[[], float]]:
    """Return for each side a function that runs some steps and gives the seconds of one."""
    from stages.core.finetune import late_logs, trainer
    from stages.core.tokenize.batches import Batches
    from tests.support.tiny_models import load_tiny, sequences
    from tests.support.tiny_runs import settings

    given = {"train": sequences(2 * steps), "validation": sequences(2, seed=1)}
    wanted = settings(batch_size=2, validate_every=10 * steps)

    def ours(ahead: int) -> float:
        late_logs.AHEAD["cpu"] = ahead
        history = trainer.fit(load_tiny(preset, (1, 1), rank=2), given, wanted).history
        return statistics.mean(history.step_seconds[5:])

    def compiled() -> tuple[object, Batches]:
        model = load_tiny(preset, (1, 1), rank=2)
        causal = trainer.make_causal(model, wanted)
        trainer._compile(causal, model, wanted, steps)
        return causal, Batches(given["train"], 2, model.mesh_shape, seed=0)

    def keras_fit() -> float:
        causal, batches = compiled()
        causal.fit(batches, epochs=1, shuffle=False, verbose=0)
        began = time.perf_counter()
        causal.fit(batches, epochs=1, shuffle=False, verbose=0)
        return (time.perf_counter() - began) / steps

    def step_alone() -> float:
        causal, batches = compiled()
        causal.make_train_function()
        state = causal._get_jax_state(
            trainable_variables=True,
            non_trainable_variables=True,
            optimizer_variables=True,
            metrics_variables=True,
        )
        data = [batches[index] for index in range(steps)]
        for batch in data[:5]:
            logs, state = causal.train_function(state, iter([batch]))
        began = time.perf_counter()
        for batch in data[5:]:
            logs, state = causal.train_function(state, iter([batch]))
        float(logs["batch_loss"])
        return (time.perf_counter() - began) / (steps - 5)

    return {
        "ours, read at once": lambda: ours(0),
        "ours, read two steps later": lambda: ours(2),
        "Keras' fit": keras_fit,
        "the compiled step alone": step_alone,
    }


@click.command()
@click.option("--steps", default=400, help="Steps of a run.")
@click.option("--rounds", default=5, help="Runs of each side.")
def main(steps: int, rounds: int) -> None:
    """Time the sides in turns and print medians."""
    from stages.core.sharding import devices
    from tests.support.tiny_presets import write_tiny_preset

    devices.configure("simulated", 1)
    with tempfile.TemporaryDirectory() as folder:
        sides = run_sides(write_tiny_preset(Path(folder) / "preset", "gemma3"), steps)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, run in sides.items():
                times[name].append(run())
    alone = statistics.median(times["the compiled step alone"])
    for name, found in times.items():
        median = statistics.median(found)
        click.echo(f"{name}: {1e3 * median:.2f} ms per step, {1e3 * (median - alone):+.2f} ms")


if __name__ == "__main__":
    main()
