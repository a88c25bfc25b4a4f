"""What the tutorial's truncation costs: the same number of steps on reviews cut off at one sequence each.

Needs the pipeline's outputs (`dvc repro`), whose packed run it compares with: the same settings and held-out reviews,
which both are measured on whole; only the training sequences differ. Takes as long as `finetune` and `evaluate` do.
Command: `python -m tests.benchmarks.bench_packing`
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from stages.core.common.paths import metrics
from stages.core.config.reader import read_params


def run(out: Path, stage: str, *settings: str) -> None:
    """Run a stage into another folder."""
    stage, *options = stage.split()
    overrides = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", f"stages.{stage}", *options, "--out-root", str(out), *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def read(root: Path, name: str) -> dict:
    """A metrics file."""
    return json.loads((root / metrics(name)).read_text())


@click.command()
def main() -> None:
    """Fine-tune on truncated reviews for as many steps as the pipeline did, and compare the held-out losses."""
    here = Path.cwd()
    batch = read_params(here / "params.yaml").finetune.batch_size
    steps = read(here, "finetune")["steps"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        run(out, "tokenize", "tokenize.packing=false")
        sequences = read(out, "tokenize")["train"]["sequences"]
        epochs = math.ceil(steps * batch / sequences)
        settings = (f"finetune.steps={steps}", f"finetune.epochs={epochs}")
        run(out, "finetune", *settings, "finetune.sample_every=null", "finetune.checkpoint_every=null")
        run(out, "evaluate --variant tuned")
        loss = {"packed": read(here, "evaluate/tuned")["loss"], "truncated": read(out, "evaluate/tuned")["loss"]}
    packed = read(here, "tokenize")
    click.echo(
        f"{steps} steps of {batch} sequences; held-out loss before: {read(here, 'evaluate/baseline')['loss']:.4f}"
    )
    click.echo(f"packed: {packed['train']['sequences']} sequences, held-out loss {loss['packed']:.4f}")
    click.echo(
        f"truncated: {sequences} sequences, {packed['tokens_cut_by_truncation_fraction']:.1%} of the tokens discarded, "
        f"{epochs} epochs begun, held-out loss {loss['truncated']:.4f}"
    )


if __name__ == "__main__":
    main()
