"""Decoding side by side: this code on one device and on eight simulated ones, and the code of an earlier commit.

Every side is a process of its own; they take turns, since the machine's speed drifts and is shared, so only ratios are
worth quoting. A turn continues four prompts by 64 tokens, greedily, with the tuned variant of the default run (Gemma 3
270M, float32, its adapter), after everything is compiled. The bound is what reading every weight once a token allows at
the rate at which all cores together read memory, measured in turns too. Needs `dvc repro`.
Command: `python -m tests.benchmarks.bench_generate --against HEAD~1`
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

BATCH, COUNT = 4, 64
SIDES = {"ours (1, 1)": (1, 1), "ours (1, 8)": (1, 8), "before (1, 1)": (1, 1), "before (1, 8)": (1, 8)}
MEMORY = "memory"
PROMPTS = [
    "Best comedy movies in the 90s ",
    "This movie was",
    "The best thing about this film is",
    "I went to see this with my brother, and",
]
# What the project must reach (issue 14): tokens per second against the code before it, and (1, 8) against one device.
TARGET, MESH_TARGET = 1.5, 0.8


def decoding(shape: tuple[int, int], root: Path) -> tuple[Callable[[], float], int]:
    """Return what continues the prompts and gives the seconds it took, and the bytes of the weights."""
    from stages.core.common.paths import Paths
    from stages.core.config.schema import Layout
    from stages.core.generate.sampling import Sampler, SamplerSettings
    from stages.core.load import adapter, variants
    from stages.core.model import lora
    from stages.core.model.causal_lm import make_model
    from stages.core.presets.formats import format_of
    from stages.core.records.layout import MeshShape
    from stages.core.sharding.named_layouts import make_layout

    paths = Paths(root, root)
    preset = variants.open_preset(paths)
    mesh = MeshShape(shape, device_kind="simulated")
    # Earlier commits' layouts lack it.
    over_batch = {"shard_over_batch": "none"} if "shard_over_batch" in Layout.model_fields else {}
    auto = Layout(name="auto", rules=None, max_replicated_fraction=1.0, **over_batch)
    config = variants.read_config(paths, "tuned")
    config = config.model_copy(update={"mesh": mesh, "layout": make_layout(auto, preset.architecture, mesh)})
    model = variants.declare_model(config, preset.architecture, config.tuned.lora)
    variants.fill_model(model, preset, adapter.load(paths.read(f"models/tuned/{config.tuned.file}"), config.base))
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    size = sum(variable.value.nbytes for variable in model.backbone.variables if "lora" not in variable.path)
    tokenizer = format_of(preset.manifest.format).load_tokenizer(preset.folder)
    prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in PROMPTS[:BATCH]]
    # No text of theirs holds `<pad>`. Before, the settings were the sampler's own, and two more had no default.
    if hasattr(lora, "merge"):
        lora.merge(model.backbone)
        continued = functools.partial(Sampler(causal), prompts, SamplerSettings(COUNT, (tokenizer.pad,)))
    else:
        settings = SamplerSettings(COUNT, temperature=0.0, top_k=None, stop_ids=(tokenizer.pad,))
        continued = functools.partial(Sampler(causal, settings), prompts, 0)

    def turn() -> float:
        began = time.perf_counter()
        found = continued()
        seconds = time.perf_counter() - began
        if [len(ids) for ids in found] != [COUNT] * BATCH:
            raise RuntimeError(f"every text must have {COUNT} tokens")
        return seconds

    turn()
    return turn, size


def reading(size: int = 1 << 30) -> tuple[Callable[[], float], int]:
    """Return what reads so many bytes of memory on all cores and gives the seconds it took."""
    import numpy as np

    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(size // 4, np.float32), 8 * cores)
    pool = ThreadPoolExecutor(cores)

    def turn() -> float:
        began = time.perf_counter()
        list(pool.map(np.max, parts))
        return time.perf_counter() - began

    turn()
    return turn, size


def serve(side: str, root: Path) -> None:
    """Set a side up, then answer each line with the seconds of a turn."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    turn, size = reading() if side == MEMORY else decoding(SIDES[side], root)
    print(json.dumps(size), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), file=answers, flush=True)


def code_of(commit: str, folder: Path) -> None:
    """Put a commit's code into a folder, with this benchmark."""
    archive = subprocess.run(["git", "archive", commit], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    shutil.copy(__file__, folder / "tests" / "benchmarks")


def start(side: str, code: Path, root: Path) -> subprocess.Popen[str]:
    """Start a side's process with the code of a folder."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_generate", "--serve", side, "--root", str(root)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=code, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often each side takes its turn.")
@click.option("--against", metavar="COMMIT", help="The code to compare with; none: only this one.")
@click.option("--root", type=click.Path(path_type=Path), default=".", help="The repository that has models/.")
@click.option("--serve", "served", type=click.Choice([*SIDES, MEMORY]), hidden=True)
def main(rounds: int, against: str | None, root: Path, served: str | None) -> None:
    """Compare decoding, and print medians and ratios."""
    if served:
        serve(served, root)
        return
    sides = [side for side in SIDES if against or not side.startswith("before")]
    with tempfile.TemporaryDirectory(prefix="bench-generate-") as temporary:
        if against:
            code_of(against, Path(temporary))
        workers = {
            side: start(side, Path(temporary) if side.startswith("before") else Path.cwd(), root.resolve())
            for side in [*sides, MEMORY]
        }
        try:
            sizes = {side: int(answer(side, worker)) for side, worker in workers.items()}
            seconds: dict[str, list[float]] = {side: [] for side in workers}
            for number in range(rounds):
                for side, worker in workers.items():
                    worker.stdin.write("\n")
                    worker.stdin.flush()
                    seconds[side].append(answer(side, worker))
                latest = ", ".join(f"{side} {each[-1]:.2f} s" for side, each in seconds.items())
                click.echo(f"round {number + 1}: {latest}", err=True)
        finally:
            for worker in workers.values():
                worker.kill()
    report(sizes, seconds)


def answer(side: str, worker: subprocess.Popen[str]) -> float:
    """Return a side's next number."""
    line = worker.stdout.readline()
    if not line:
        raise click.ClickException(f"{side} ended with exit code {worker.wait()}")
    return json.loads(line)


@dataclasses.dataclass(frozen=True)
class Bound:
    """What reading the weights once a token allows: bytes per second, and tokens per second of the batch."""

    rate: float
    tokens: float


def report(sizes: dict[str, int], seconds: dict[str, list[float]]) -> None:
    """Print a line a side, and whether the targets are met."""
    rate = sizes[MEMORY] / statistics.median(seconds.pop(MEMORY))
    bound = Bound(rate, BATCH * rate / sizes["ours (1, 1)"])
    click.echo(
        f"memory {bound.rate / 1e9:.1f} GB/s; weights {sizes['ours (1, 1)'] / 1e9:.2f} GB: at most {bound.tokens:.1f} "
        f"tokens/s with a batch of {BATCH}"
    )

    def ratio(one: str, other: str) -> float:
        """How much faster a side is than another, round by round."""
        return statistics.median(b / a for a, b in zip(seconds[one], seconds[other], strict=True))

    for side, each in seconds.items():
        speed = BATCH * COUNT / statistics.median(each)
        line = f"{side:<14} {speed:7.1f} tokens/s = {speed / bound.tokens:5.1%} of the bound"
        if side != "ours (1, 1)":
            line += f"; {ratio(side, 'ours (1, 1)'):.2f} x ours on one device"
        click.echo(line)
    if "before (1, 1)" in seconds:
        click.echo(f"Target: {ratio('ours (1, 1)', 'before (1, 1)'):.2f} x the code before (at least {TARGET}).")
    click.echo(f"Target: (1, 8) {ratio('ours (1, 8)', 'ours (1, 1)'):.2f} of one device (at least {MESH_TARGET}).")


if __name__ == "__main__":
    main()
