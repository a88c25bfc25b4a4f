"""The training step side by side: ours, the tutorial's own code path, and Hugging Face PEFT.

Every side is a process of its own that holds the same Gemma 3 270M and waits; they take turns, round after round, so
that all see the machine in the same state, and only ratios are worth quoting. Needs the fetched preset (`dvc repro
fetch`); PEFT is measured where torch, transformers and peft can be imported by --peft-python
(requirements-benchmarks.txt installs them, best in an environment of their own).
Command: `python -m tests.benchmarks.bench_step --batch 2 --rounds 5`
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

LENGTH, RANK, RATE = 128, 4, 1.0e-3
STEPS_A_TURN = 2
# Model flops of a token: 2 for each weight a product touches, forward, and 2 more for the gradient in its input (the
# weights are frozen); 100,270,080 weights in the blocks' kernels and 262,144 x 640 in the head. Attention is left out.
FLOPS_A_TOKEN = 4 * (100_270_080 + 262_144 * 640)
SIDES = ("ours (1, 1)", "ours (1, 8)", "ours (1, 1) int8", "ours (1, 1) int4", "keras fit", "peft", "matrix product")


def peak_bytes() -> int:
    """This process's largest resident memory, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def batches(batch: int) -> list[dict]:
    """A few batches of random tokens, the same for all sides."""
    import numpy as np

    random = np.random.default_rng(0)
    ids = random.integers(4, 260_000, (4, batch, LENGTH + 1)).astype(np.int32)
    ids[:, :, 0] = 2
    return [{"token_ids": each[:, :-1], "target_ids": each[:, 1:]} for each in ids]


def our_side(shape: tuple[int, int], batch: int, dtype: str = "float32") -> Callable[[int], list[float]]:
    """The step of `stages.finetune` with a `load.dtype`."""
    from stages.core.common.paths import Paths
    from stages.core.config.reader import read_params
    from stages.core.finetune import trainer
    from stages.core.load import variants
    from stages.core.records.layout import MeshShape
    from stages.core.sharding.named_layouts import make_layout

    params = read_params(Path("params.yaml"))
    preset = variants.open_preset(Paths(Path.cwd(), Path.cwd()))
    mesh = MeshShape(shape, device_kind="simulated")
    config = variants.model_config(preset, dtype, mesh, make_layout(params.layout, preset.architecture, mesh))
    changes = {"rank": RANK, "targets": ["query", "value"], "learning_rate": RATE}
    settings = params.finetune.model_copy(update=changes)
    model = trainer.load_trainable(preset, config, settings)
    import numpy as np

    from stages.core.model.causal_lm import make_model, pin_to_mesh

    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    import keras

    causal.compile(optimizer=keras.optimizers.AdamW(RATE, weight_decay=0.01), loss=None, jit_compile=True)
    causal.optimizer.build(causal.trainable_variables)
    pin_to_mesh(causal, model.jax_mesh)
    ones = np.ones((batch, LENGTH))
    data = [{**each, "weights": ones.astype("f4"), "segment_ids": ones.astype("i4")} for each in batches(batch)]

    def feed(steps: int) -> dict:
        return {"x": ((data[step % len(data)],) for step in range(steps)), "steps_per_epoch": steps}

    return fit_side(causal, feed)


def keras_side(batch: int) -> Callable[[int], list[float]]:
    """The tutorial's path: keras-hub's causal model, `enable_lora`, `compile`, `fit`."""
    os.environ["KERAS_BACKEND"] = "jax"
    from stages.core.common.paths import cache_folder
    from stages.core.presets.gguf import GgufWeights
    from stages.core.presets.gguf_architecture import read_architecture
    from stages.core.sharding.devices import configure

    configure("simulated", 1)
    import keras
    import keras_hub
    import numpy as np

    path = next(cache_folder().glob("presets/*/*.gguf"))
    architecture = read_architecture(path.parent)
    backbone = keras_hub.models.Gemma3Backbone(**architecture.config, dtype="float32")
    weights = GgufWeights(path)
    for variable in backbone.weights:
        variable.assign(weights.read(variable.path))
    backbone.enable_lora(RANK)
    causal = keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=None)
    optimizer = keras.optimizers.AdamW(RATE, weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    causal.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=optimizer,
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
        sampler="greedy",
    )
    data = batches(batch)

    def feed(steps: int) -> dict:
        chosen = [data[step % len(data)] for step in range(steps)]
        ids, targets = (np.concatenate([each[name] for each in chosen]) for name in ("token_ids", "target_ids"))
        x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        return {"x": x, "y": targets, "sample_weight": np.ones(ids.shape, "f4"), "batch_size": batch, "shuffle": False}

    return fit_side(causal, feed)


def fit_side(model: object, feed: Callable[[int], dict]) -> Callable[[int], list[float]]:
    """Run Keras' `fit` on what `feed` gives for some steps, and return the seconds of each."""
    import keras

    class Clock(keras.callbacks.Callback):
        """Notes when a step's loss is there."""

        def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
            self.began = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            float(logs["loss"])
            seconds.append(time.perf_counter() - self.began)

    seconds: list[float] = []

    def turn(steps: int) -> list[float]:
        seconds.clear()
        model.fit(**feed(steps), verbose=0, callbacks=[Clock()])
        return list(seconds)

    return turn


def peft_side(batch: int) -> Callable[[int], list[float]]:
    """LoRA of the same rank on the same projections by Hugging Face PEFT on PyTorch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    path = Path(os.environ["BENCH_GGUF"])
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"]))
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], RATE, weight_decay=0.01)
    data = [{name: torch.from_numpy(values).long() for name, values in each.items()} for each in batches(batch)]

    def turn(steps: int) -> list[float]:
        seconds = []
        for step in range(steps):
            began = time.perf_counter()
            each = data[step % len(data)]
            logits = model(input_ids=each["token_ids"], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), each["target_ids"].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            seconds.append(time.perf_counter() - began)
        return seconds

    return turn


def product_side() -> Callable[[int], list[float]]:
    """A plain float32 product of 2,048 x 2,048 matrices: the machine's rate."""
    from stages.core.sharding.devices import configure

    configure("simulated", 1)
    import jax
    import jax.numpy as jnp

    square = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: a @ a)
    product(square).block_until_ready()

    def turn(steps: int) -> list[float]:
        seconds = []
        for _ in range(4 * steps):
            began = time.perf_counter()
            product(square).block_until_ready()
            seconds.append(time.perf_counter() - began)
        return seconds

    return turn


def serve(side: str, batch: int) -> None:
    """Set a side up, then run turns on demand: a number of steps in, a JSON line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    turn = {
        "ours (1, 1)": lambda: our_side((1, 1), batch),
        "ours (1, 8)": lambda: our_side((1, 8), batch),
        "ours (1, 1) int8": lambda: our_side((1, 1), batch, "int8_float32"),
        "ours (1, 1) int4": lambda: our_side((1, 1), batch, "int4_float32"),
        "keras fit": lambda: keras_side(batch),
        "peft": lambda: peft_side(batch),
        "matrix product": product_side,
    }[side]()
    for line in sys.stdin:
        print(json.dumps({"seconds": turn(int(line)), "peak": peak_bytes()}), file=answers, flush=True)


@click.command()
@click.option("--batch", default=2, help="Sequences per step.")
@click.option("--rounds", default=5, help="Turns of each side.")
@click.option("--side", "only", multiple=True, type=click.Choice(SIDES), help="Measure these sides only.")
@click.option("--peft-python", default=sys.executable, help="The Python that has torch, transformers and peft.")
@click.option("--serve", "served", type=click.Choice(SIDES), hidden=True)
def main(batch: int, rounds: int, only: tuple[str, ...], peft_python: str, served: str | None) -> None:
    """Measure the training step of each side in turns and print medians and ratios."""
    if served:
        serve(served, batch)
        return
    from stages.core.common.paths import cache_folder

    gguf = next(cache_folder().glob("presets/*/*.gguf"))
    sides = list(only or SIDES)
    if peft_python == sys.executable and importlib.util.find_spec("peft") is None and "peft" in sides:
        click.echo("peft is not installed here: left out (see --peft-python)", err=True)
        sides.remove("peft")
    workers = {}
    for side in sides:
        python = peft_python if side == "peft" else sys.executable
        command = [python, "-m", "tests.benchmarks.bench_step", "--batch", str(batch), "--serve", side]
        workers[side] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "BENCH_GGUF": str(gguf), "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, int] = {}

    def turn(side: str, steps: int) -> list[float]:
        worker = workers[side]
        worker.stdin.write(f"{steps}\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise click.ClickException(f"{side} ended with exit code {worker.wait()}")
        answer = json.loads(line)
        peaks[side] = answer["peak"]
        return answer["seconds"]

    try:
        for side in sides:
            click.echo(f"{side}: first step {turn(side, 2)[0]:.1f} s (set up and compiled)", err=True)
        for _ in range(rounds):
            for side in sides:
                seconds[side] += turn(side, STEPS_A_TURN)
    finally:
        for worker in workers.values():
            worker.kill()
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    report(medians, peaks, batch)


def report(medians: dict[str, float], peaks: dict[str, int], batch: int) -> None:
    """Print one line per side: seconds, tokens per second, rate, peak memory, and our speed-up on one device."""
    flops = FLOPS_A_TOKEN * batch * LENGTH
    product = medians.pop("matrix product", None)
    rate = None if product is None else 2 * 2048**3 / product
    click.echo(f"batch {batch} x {LENGTH} tokens, rank {RANK}, float32; medians")
    for side, each in medians.items():
        line = (
            f"{side:<16} {each:7.3f} s a step {batch * LENGTH / each:8.1f} tokens/s {flops / each / 1e9:7.1f} GFLOP/s"
        )
        if rate:
            line += f" = {flops / each / rate:5.1%} of the matrix product"
        line += f"  peak {peaks[side] / 2**30:5.2f} GiB"
        if "ours (1, 1)" in medians:
            line += f"  {each / medians['ours (1, 1)']:5.2f} x ours on one device"
        click.echo(line)
    if rate:
        click.echo(f"matrix product {rate / 1e9:.1f} GFLOP/s")


if __name__ == "__main__":
    main()
