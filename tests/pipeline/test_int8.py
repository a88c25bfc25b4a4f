"""An int8 base through every stage, on a tiny preset: what is measured, exported and said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.core.common.paths import Paths
from stages.core.export.tuned import open_tuned
from tests.support.copies import change
from tests.support.small_project import run, succeed, write_project

NO_TASK = ("--set", "evaluate.tasks=null")
STAGES = [
    ("fetch",),
    ("prepare",),
    ("tokenize",),
    ("load",),
    ("finetune",),
    ("generate", "--variant", "baseline"),
    ("generate", "--variant", "tuned"),
    ("evaluate", "--variant", "baseline"),
    ("evaluate", "--variant", "tuned"),
    ("compare",),
    ("export",),
    ("report",),
]


@pytest.fixture(scope="module")
def folder(presets, tmp_path_factory):
    """A run over an int8 base, its token table included, with the loss before quantizing asked for."""
    folder = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GEMMA_TUNING_CACHE", str(folder / "cache"))
        write_project(folder, presets["gemma2"], "int8_table_float32")
        change(folder, "finetune", sample_every=2, sample_tokens=3, checkpoint_every=2)
        change(folder, "generate", max_tokens=3, prompts=["This movie was"])
        change(folder, "evaluate", tasks=["float_base"])
        change(folder, "export", formats=["peft", "huggingface"])
        for stage in STAGES:
            succeed(*stage)
        yield folder


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_the_baseline_is_measured_before_and_after_quantizing_and_the_tuned_after(folder):
    baseline, tuned = (read(folder, f"data/metrics/evaluate/{each}.json") for each in ("baseline", "tuned"))
    change_of_loss = baseline["float_base"]["loss_difference"]
    assert change_of_loss == pytest.approx(baseline["loss"] - baseline["float_base"]["loss"], abs=2e-5)
    assert 0 < abs(change_of_loss) < 0.05
    assert baseline["float_base"]["loss_difference_standard_error"] > 0
    assert "float_base" not in tuned and tuned["loss"] < baseline["loss"]
    assert "quantizing" in (folder / "data/report/index.html").read_text()


def test_the_sharding_tells_codes_and_scales_apart_and_counts_the_models_parameters(folder):
    sharding = read(folder, "data/sharding/tuned.json")
    assert sharding["dtype"] == read(folder, "models/tuned/model.json")["dtype"] == "int8_table_float32"
    rows = {row["pattern"]: row for row in sharding["weights"] if row["kind"] == "weight"}
    linear, scale = (rows[f"decoder_block_*/ffw_linear/kernel{end}"] for end in ("", "_scale"))
    assert (linear["dtype"], linear["spec"]) == ("int8", ["model", None])
    assert (scale["dtype"], scale["shape"], scale["spec"]) == ("float32", [1, 64], [None, None])
    assert rows["token_embedding/embeddings_scale"]["spec"] == ["model", None]
    in_floats = sum(row["bytes"] for row in rows.values() if row["dtype"] != "int8" and "_scale" not in row["pattern"])
    codes = sum(row["bytes"] for row in rows.values() if row["dtype"] == "int8")
    lora = sum(row["bytes"] for row in sharding["weights"] if row["kind"] == "lora")
    assert sharding["parameters"] == codes + in_floats // 4 + lora // 4


def test_what_is_exported_is_merged_into_the_base_as_it_was_and_says_so(folder):
    for name in ("peft", "huggingface"):
        card = (folder / f"models/export/{name}/README.md").read_text()
        assert "quantized to 8 bits (`load.dtype: int8_table_float32`)" in card
        assert "it is merged into the base as it was before that" in card
        assert "Before the base was quantized its loss was" in card
    # The stage has compared every logit with this one's.
    assert str(open_tuned(Paths(folder, folder)).kept_in) == "float32"


def test_a_loaded_int8_base_is_not_trained_in_full(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = run(
        "finetune", "--set", "load.dtype=float32", "--set", "finetune.rank=0", *NO_TASK, "--out-root", "scratch/f"
    )
    assert done.exit_code == 1
    assert "Received: models/baseline in int8_table_float32, finetune.rank=0." in done.stderr
    assert "Traceback" not in done.output


def test_without_the_task_nothing_else_is_loaded(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = run("evaluate", "--variant", "baseline", *NO_TASK, "--out-root", "scratch/plain")
    assert done.exit_code == 0, done.output
    plain = read(folder, "scratch/plain/data/metrics/evaluate/baseline.json")
    whole = read(folder, "data/metrics/evaluate/baseline.json")
    assert plain == {key: value for key, value in whole.items() if key != "float_base"}


def test_load_tells_the_bytes_before_and_after(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = run("load", "--dry-run")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("tiny, int8_table_float32\n")
    line = next(line for line in done.output.splitlines() if line.startswith("Weights in all: "))
    assert "if all were float32. Codes of 8 bits" in line and "norms in float32" in line


def test_load_tells_codes_of_4_and_of_8_bits_apart(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = run("load", "--dry-run", "--set", "load.dtype=int4_float32")
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if line.startswith("Weights in all: "))
    # Of two blocks queries, keys and the first two matrices of each feed-forward, and their scales and offsets.
    numbers = 2 * (4 * 64 * 16 + 2 * 64 * 16 + 2 * 64 * 64)
    assert f"codes of 4 bits {numbers // 2:,}, their scales" in line
