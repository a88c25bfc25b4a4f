"""The default pipeline for real: Gemma 3 270M, real reviews, eight simulated devices. Minutes, not seconds.

What takes as long as it has tokens is cut, and nothing else: see `SHORTER`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.core.common.paths import HELD_OUT
from stages.core.tokenize import held_out
from stages.core.tokenize.store import write_sequences
from tests.support.copies import change, copy_repository, dvc, ran
from tests.support.repository import DATA, REAL_CACHE

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("default run")]

# The cache that a user's runs have, and programs compiled as theirs are.
AS_A_USER = {"GEMMA_TUNING_CACHE": str(REAL_CACHE), "PYTHONPATH": ""}
# Of 186 steps 16, each larger; of 20 held-out reviews the first 128 tokens; no plan (tests/config compiles those of the
# profiles).
SHORTER = {
    "prepare": {"validation": 20},
    "finetune": {"steps": 16, "warmup_steps": 2, "learning_rate": 1.0e-3, "sample_every": None},
    "generate": {"max_tokens": 16},
    "evaluate": {"max_length": 128},
    "plan": {"targets": []},
}


@pytest.fixture(scope="module")
def repository(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which `dvc repro` was run with the settings as they are, but shorter."""
    folder = copy_repository(tmp_path_factory.mktemp("default"))
    for section, values in SHORTER.items():
        change(folder, section, **values)
    dvc(folder, "repro", forked=False, **AS_A_USER)
    return folder


def read(repository: Path, name: str) -> dict:
    """A metrics file."""
    return json.loads((repository / f"data/metrics/{name}.json").read_text())


def test_the_tuned_model_is_less_surprised_by_reviews_it_has_not_seen(repository: Path):
    before, after = read(repository, "evaluate/baseline"), read(repository, "evaluate/tuned")
    assert before["targets"] == after["targets"] > 2_000
    assert before["reviews"] == 20
    assert before["reviews_cut"] == after["reviews_cut"]
    assert after["perplexity"] < 0.98 * before["perplexity"]
    compared = read(repository, "compare")
    assert compared["loss_difference"] < -2 * compared["loss_difference_standard_error"]


def test_the_model_is_really_sharded(repository: Path):
    load = read(repository, "load")
    assert load["devices"] == 8
    assert load["parameters"] == 268_098_176
    assert load["replicated_fraction"] < 0.001
    assert load["bytes_per_device_max"] < 1.01 * 4 * 268_098_176 / 4, "a model axis of 4"


def test_the_adapter_is_the_size_that_rank_and_targets_give(repository: Path):
    finetune = read(repository, "finetune")
    # Of each of 18 blocks: A and B on query (4 heads), key and value (1 head), on the heads' output, and on the MLP.
    attention = (4 + 1 + 1) * 640 * 8 + 3 * 8 * 256 + 4 * 256 * 8 + 8 * 640
    mlp = 2 * (640 * 8 + 8 * 2048) + 2048 * 8 + 8 * 640
    assert finetune["trainable_parameters"] == 18 * (attention + mlp)
    rows = (repository / "data/plots/finetune.csv").read_text().splitlines()
    assert len(rows) == 1 + finetune["steps"]
    assert rows[-1].split(",")[-1], "the validation loss stands beside the last step"


def test_the_prompts_are_continued_differently_after_tuning(repository: Path):
    texts = {}
    for variant in ("baseline", "tuned"):
        lines = (repository / f"data/generated/{variant}.jsonl").read_text().splitlines()
        texts[variant] = [json.loads(line) for line in lines]
    assert texts["tuned"][0]["prompt"] == "Best comedy movies in the 90s "
    assert [each["prompt"] for each in texts["tuned"]] == [each["prompt"] for each in texts["baseline"]]
    assert any(b["text"] != t["text"] for b, t in zip(texts["baseline"], texts["tuned"], strict=True))


def test_a_second_repro_runs_nothing(repository: Path):
    assert ran(dvc(repository, "repro", forked=False, **AS_A_USER)) == set()


def test_the_baseline_loss_on_a_review_is_hugging_faces(repository: Path):
    """By tests/data/record_reference.py, from the same file in PyTorch: BOS and the first 127 tokens."""
    expected = json.loads((DATA / "reference_gemma3_270m.json").read_text())["first_review"]
    bos, *review = expected["token_ids"]
    trial = repository / "scratch" / "reference"
    write_sequences(trial / HELD_OUT, held_out.of_reviews([review], bos=bos, eos=None))
    subprocess.run(
        [sys.executable, "-m", "stages.evaluate", "--variant", "baseline", "--out-root", str(trial)],
        cwd=repository,
        env={**os.environ, **AS_A_USER},
        check=True,
        capture_output=True,
    )
    measured = json.loads((trial / "data/metrics/evaluate/baseline.json").read_text())
    assert measured["targets"] == len(review)
    assert measured["loss"] == pytest.approx(expected["loss"], abs=2e-5)
