"""An int4 base through the stages that make and read its codes, on a tiny preset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.copies import change
from tests.support.small_project import run, succeed, write_project


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


@pytest.fixture
def folder(presets, tmp_path, monkeypatch):
    """A folder with settings and data, where `load` has not run yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path / "cache"))
    write_project(tmp_path, presets["gemma2"], "int4_float32")
    change(tmp_path, "finetune", sample_every=None, checkpoint_every=None)
    for stage in ("fetch", "prepare", "tokenize"):
        succeed(stage)
    return tmp_path


def test_the_base_is_loaded_with_the_codes_that_were_chosen_and_no_others(folder):
    early = run("load")
    assert early.exit_code == 1 and "python -m stages.quantize" in early.output
    succeed("quantize")
    metrics, index = (read(folder, name) for name in ("data/metrics/quantize.json", "models/quantized/index.json"))
    assert metrics["matrices"] == len(index["kernels"]) > 0
    assert metrics["output_error_chosen_fraction"] < metrics["output_error_nearest_fraction"]
    for stage in (("load",), ("finetune",), ("evaluate", "--variant", "baseline"), ("evaluate", "--variant", "tuned")):
        succeed(*stage)
    chosen = read(folder, "data/metrics/evaluate/baseline.json")["loss"]
    assert read(folder, "data/metrics/evaluate/tuned.json")["loss"] < chosen
    assert read(folder, "models/tuned/model.json")["codes"] == read(folder, "models/baseline/model.json")["codes"]

    files = {path.name: path.read_bytes() for path in (folder / "models/quantized").iterdir()}
    succeed("quantize")
    assert {path.name: path.read_bytes() for path in (folder / "models/quantized").iterdir()} == files

    change(folder, "quantize", sequences=None)
    succeed("quantize")
    assert [path.name for path in (folder / "models/quantized").iterdir()] == ["index.json"]
    stale = run("evaluate", "--variant", "tuned")
    assert (
        stale.exit_code == 1 and "models/tuned must have been made with the codes in models/quantized" in stale.output
    )
    succeed("load")
    succeed("evaluate", "--variant", "baseline")
    assert read(folder, "data/metrics/evaluate/baseline.json")["loss"] != chosen
    assert "codes" not in read(folder, "models/baseline/model.json")


def test_of_another_dtype_nothing_is_chosen_and_no_weight_is_read(folder):
    change(folder, "load", dtype="float32")
    (folder / "models/preset/manifest.json").unlink()
    succeed("quantize")
    assert read(folder, "models/quantized/index.json") == {"files": {}, "kernels": []}
    assert read(folder, "data/metrics/quantize.json")["matrices"] == 0
