"""A project of a tiny preset and a few reviews, whose stages run in the process of the test."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path

from click.testing import CliRunner, Result

from tests.support.copies import change
from tests.support.repository import ROOT
from tests.support.tiny_presets import tiny_reviews


def write_project(folder: Path, preset: Path, dtype: str) -> None:
    """Write settings and reviews: two devices, three steps, and a base in a `load.dtype`."""
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "reviews.txt").write_text("\n".join(each.replace("\n", " ") for each in tiny_reviews(12)) + "\n")
    change(folder, "fetch", source="path", preset="tiny", path=str(preset))
    change(folder, "prepare", source="files", train_file="reviews.txt", validation=4, min_characters=1)
    change(folder, "tokenize", length=32)
    change(folder, "mesh", shape=[1, 2])
    change(folder, "layout", max_replicated_fraction=1.0)
    change(folder, "load", dtype=dtype)
    change(folder, "finetune", batch_size=2, steps=3, learning_rate=0.01, schedule="constant", warmup_steps=0)


def run(stage: str, *arguments: str) -> Result:
    """Run a stage in this process, which has JAX and Keras already, in the current folder."""
    return CliRunner().invoke(import_module(f"stages.{stage}").main, arguments)


def succeed(stage: str, *arguments: str) -> None:
    """Run a stage, which must succeed."""
    result = run(stage, *arguments)
    assert result.exit_code == 0, (stage, result.output, result.exception)
