"""An int4 base through the stages that make and read its codes, on a tiny preset."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.copies import change
from tests.support.repository import ROOT
from tests.support.tiny_presets import tiny_reviews


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def run(stage: str, *arguments: str):
    """Run a stage in this process, which has JAX and Keras already."""
    return CliRunner().invoke(import_module(f"stages.{stage}").main, arguments)


def done(stage: str, *arguments: str) -> None:
    result = run(stage, *arguments)
    assert result.exit_code == 0, (stage, result.output, result.exception)


@pytest.fixture
def folder(presets, tmp_path, monkeypatch):
    """A folder with settings and data, where `load` has not run yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path / "cache"))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "reviews.txt").write_text("\n".join(each.replace("\n", " ") for each in tiny_reviews(12)) + "\n")
    change(tmp_path, "fetch", source="path", preset="tiny", path=str(presets["gemma2"]))
    change(tmp_path, "prepare", source="files", train_file="reviews.txt", validation=4, min_characters=1)
    change(tmp_path, "tokenize", length=32)
    change(tmp_path, "mesh", shape=[1, 2])
    change(tmp_path, "layout", max_replicated_fraction=1.0)
    change(tmp_path, "load", dtype="int4_float32")
    change(tmp_path, "finetune", batch_size=2, steps=3, learning_rate=0.01, schedule="constant", warmup_steps=0)
    change(tmp_path, "finetune", sample_every=None, checkpoint_every=None)
    for stage in ("fetch", "prepare", "tokenize"):
        done(stage)
    return tmp_path


def test_the_base_is_loaded_with_the_codes_that_were_chosen_and_no_others(folder):
    early = run("load")
    assert early.exit_code == 1 and "python -m stages.quantize" in early.output
    done("quantize")
    metrics, index = (read(folder, name) for name in ("data/metrics/quantize.json", "models/quantized/index.json"))
    assert metrics["matrices"] == len(index["kernels"]) > 0
    assert metrics["output_error_chosen_fraction"] < metrics["output_error_nearest_fraction"]
    for stage in (("load",), ("finetune",), ("evaluate", "--variant", "baseline"), ("evaluate", "--variant", "tuned")):
        done(*stage)
    chosen = read(folder, "data/metrics/evaluate/baseline.json")["loss"]
    assert read(folder, "data/metrics/evaluate/tuned.json")["loss"] < chosen
    assert read(folder, "models/tuned/model.json")["codes"] == read(folder, "models/baseline/model.json")["codes"]

    files = {path.name: path.read_bytes() for path in (folder / "models/quantized").iterdir()}
    done("quantize")
    assert {path.name: path.read_bytes() for path in (folder / "models/quantized").iterdir()} == files

    change(folder, "quantize", windows=None)
    done("quantize")
    assert [path.name for path in (folder / "models/quantized").iterdir()] == ["index.json"]
    stale = run("evaluate", "--variant", "tuned")
    assert stale.exit_code == 1 and "models/tuned must be of the codes in models/quantized" in stale.output
    done("load")
    done("evaluate", "--variant", "baseline")
    assert read(folder, "data/metrics/evaluate/baseline.json")["loss"] != chosen
    assert "codes" not in read(folder, "models/baseline/model.json")


def test_of_another_dtype_nothing_is_chosen_and_no_weight_is_read(folder):
    change(folder, "load", dtype="float32")
    (folder / "models/preset/manifest.json").unlink()
    done("quantize")
    assert read(folder, "models/quantized/index.json") == {"files": {}, "kernels": []}
    assert read(folder, "data/metrics/quantize.json")["matrices"] == 0
