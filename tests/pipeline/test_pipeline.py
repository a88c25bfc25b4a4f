"""The whole pipeline with the real dvc on a tiny preset: what runs, and what runs again when one setting changes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stages.core.generate.texts import visible
from stages.core.records.summary import Summary
from tests.support import warm
from tests.support.copies import IDENTITY, change, copy_repository, dvc, ran
from tests.support.sentinels import HF_TOKEN, KAGGLE_TOKEN, leaks
from tests.support.tiny_presets import tiny_reviews

pytestmark = pytest.mark.xdist_group("pipeline")

ALL = {
    "fetch",
    "prepare",
    "tokenize",
    "quantize",
    "load",
    "finetune",
    "generate@baseline",
    "generate@tuned",
    "evaluate@baseline",
    "evaluate@tuned",
    "compare",
    "export",
    "plan",
    "report",
}
TUNED = {"finetune", "generate@tuned", "evaluate@tuned", "compare", "export", "report"}
# A plan fills what its entries leave out from the sections that shape a step.
PLANNED = {"plan"}


@pytest.fixture(scope="module")
def repository(one_block: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh copy of the repository on a tiny Gemma 3 and made-up reviews, run once."""
    folder = copy_repository(tmp_path_factory.mktemp("repository"))
    (folder / "reviews.txt").write_text("\n".join(review.replace("\n", " ") for review in tiny_reviews(24)) + "\n")
    change(folder, "fetch", source="path", preset="tiny", path=str(one_block))
    change(folder, "prepare", source="files", train_file="reviews.txt", validation=4, min_characters=1)
    change(folder, "tokenize", length=32)
    change(folder, "finetune", batch_size=4, steps=3)
    change(folder, "generate", max_tokens=6)
    change(folder, "plan", targets=[{"topology": "cpu:8"}])
    # Tokens that no stage needs: a test looks whether one wrote them down.
    assert ran(dvc(folder, "repro", KAGGLE_API_TOKEN=KAGGLE_TOKEN, HF_TOKEN=HF_TOKEN)) == ALL
    return folder


def test_a_second_repro_runs_nothing(repository: Path):
    assert ran(dvc(repository, "repro")) == set()
    assert "up to date" in dvc(repository, "status").stdout


def test_no_token_of_the_environment_is_in_a_file_of_the_repository_the_report_included(repository: Path):
    assert (repository / "data/report/index.html").is_file()
    assert leaks(repository) == []


def test_dvcs_own_views_show_something_sensible(repository: Path):
    shown = dvc(repository, "metrics", "show").stdout
    assert "perplexity_base" in shown and max(map(len, shown.splitlines())) <= 160
    metrics = json.loads(dvc(repository, "metrics", "show", "--json").stdout)[""]["data"]
    assert set(metrics) == {"data/run.json"}
    run = metrics["data/run.json"]["data"]
    assert set(run) == set(Summary.model_fields) - {"plan_hbm", "variants"}, (
        "a simulated device has no memory of its own"
    )
    assert run["perplexity"] < run["perplexity_base"]
    compared = json.loads((repository / "data/metrics/compare.json").read_text())
    assert compared["loss_difference"] < 0 < compared["loss_difference_standard_error"]
    assert compared["perplexity_ratio"] < 1
    dvc(repository, "plots", "show", "--out", "plots-trial")
    page = (repository / "plots-trial" / "index.html").read_text()
    assert "Loss of training and held-out reviews" in page
    shutil.rmtree(repository / "plots-trial")
    assert "finetune" in dvc(repository, "dag", "--mermaid").stdout


# Other changes of settings are in test_reruns.py.
def test_a_changed_length_cuts_anew_and_leaves_what_was_measured_of_the_baseline(repository: Path):
    """The held-out reviews are measured whole, so the baseline's figure stays what it is."""
    change(repository, "tokenize", length=24, packing=False)
    kept = {"fetch", "prepare", "load", "generate@baseline", "evaluate@baseline"}
    assert ran(dvc(repository, "repro")) == ALL - kept


def test_rank_0_trains_every_weight_and_is_loaded_again_and_what_was_run_before_is_taken_from_there(repository: Path):
    before = (repository / "params.yaml").read_text()
    change(repository, "finetune", rank=0)
    assert ran(dvc(repository, "repro")) == TUNED | PLANNED
    metrics = json.loads((repository / "data/metrics/finetune.json").read_text())
    assert metrics["trainable_parameters"] == metrics["total_parameters"]
    assert (repository / "models/tuned/weights.safetensors").exists()
    assert not (repository / "models/tuned/adapter.safetensors").exists()
    (repository / "params.yaml").write_text(before)
    dvc(repository, "repro")


def test_the_same_settings_give_the_same_bytes(repository: Path):
    names = ["models/tuned/adapter.safetensors", "models/tuned/model.json", "data/sharding/tuned.json"]
    names += [
        "data/generated/tuned.jsonl",
        "data/tokens/train.npz",
        "data/tokens/held_out.npz",
        "data/evaluations/tuned.csv",
        "data/imdb/train.parquet",
        "data/sharding/base.json",
    ]
    first = {name: (repository / name).read_bytes() for name in names}
    makers = ["prepare", "tokenize", "quantize", "load", "finetune", "generate@tuned", "evaluate@tuned"]
    # By new interpreters, whose hashes have other seeds.
    assert ran(dvc(repository, "repro", "--force", "--single-item", *makers, forked=False)) == set(makers)
    assert {name: (repository / name).read_bytes() for name in names} == first


def test_an_experiment_can_be_run_and_compared(repository: Path):
    subprocess.run(["git", "add", "-A"], cwd=repository, check=True)
    subprocess.run(["git", *IDENTITY, "commit", "-qm", "Tiny"], cwd=repository, check=True)
    dvc(repository, "exp", "run", "-n", "higher", "-S", "finetune.learning_rate=0.01")
    table = dvc(repository, "exp", "show", "--csv").stdout
    assert "higher" in table
    assert "0.01" in table
    # As the workflow for pull requests compares.
    assert "| data/run.json | loss" in re.sub(" +", " ", dvc(repository, "metrics", "diff", "--md", "HEAD").stdout)
    assert "| finetune.learning_rate" in dvc(repository, "params", "diff", "--md", "HEAD").stdout
    subprocess.run(["git", "checkout", "-q", "."], cwd=repository, check=True)
    dvc(repository, "checkout")


def test_a_trial_with_out_root_leaves_the_pipeline_alone(repository: Path):
    before = dvc(repository, "status").stdout
    command = [warm.python(), "-m", "stages.generate", "--variant", "tuned", "--out-root", "scratch/x"]
    subprocess.run([*command, "--set", "generate.max_tokens=2"], cwd=repository, check=True, capture_output=True)
    assert (repository / "scratch/x/data/generated/tuned.jsonl").exists()
    assert json.loads((repository / "scratch/x/data/metrics/generate/tuned.json").read_text())["tokens"] <= 6
    assert dvc(repository, "status").stdout == before


def test_prompts_are_tried_with_both_variants_and_nothing_is_written(repository: Path):
    before = dvc(repository, "status").stdout
    kept = {variant: (repository / f"data/generated/{variant}.jsonl").read_text() for variant in ("baseline", "tuned")}
    command = [warm.python(), "-m", "stages.generate", "--prompt", "This movie was", "--prompt", "So"]
    shown = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout
    for variant, lines in kept.items():
        text = next(line["text"] for line in map(json.loads, lines.splitlines()) if line["prompt"] == "This movie was")
        assert f"[{variant}]\nThis movie was{visible(text)}\n\nSo" in shown
        assert (repository / f"data/generated/{variant}.jsonl").read_text() == lines
    assert dvc(repository, "status").stdout == before


def test_an_altered_preset_file_is_told_with_the_way_to_repair_it(repository: Path, one_block: Path):
    weights = one_block / "model.weights.h5"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        command = [warm.python(), "-m", "stages.load", "--out-root", "scratch/y"]
        result = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    finally:
        weights.write_bytes(whole)
    assert result.returncode == 1
    assert "model.weights.h5" in result.stderr
    assert "dvc repro --force --single-item fetch" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_adapter_is_refused_on_another_base(repository: Path, presets: dict[str, Path]):
    trial = repository / "scratch/other"
    set_other = [
        "--set",
        "fetch.preset=other",
        "--set",
        f"fetch.path={presets['gemma']}",
        "--out-root",
        "scratch/other",
    ]
    subprocess.run([warm.python(), "-m", "stages.fetch", *set_other], cwd=repository, check=True, capture_output=True)
    command = [warm.python(), "-m", "stages.evaluate", "--variant", "tuned", "--out-root", "scratch/other"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert result.returncode == 1
    assert "made from another preset" in result.stderr
    shutil.rmtree(trial)
