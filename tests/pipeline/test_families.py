"""Each Gemma family, and the shape of E2B, through every stage, on tiny presets in each form that they come in."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import warm
from tests.support.copies import change
from tests.support.hf_folder import write_hugging_face
from tests.support.repository import FAMILIES, ROOT
from tests.support.servers import hub_server
from tests.support.small_project import succeed
from tests.support.tiny_presets import EDGE, tiny_reviews, write_tiny_preset

REPO = "somebody/tiny"
# What follows `fetch` and `prepare` and needs the model; `plan` needs its configuration only.
STAGES = [
    ("tokenize",),
    ("load",),
    ("finetune",),
    ("generate", "--variant", "baseline"),
    ("generate", "--variant", "tuned"),
    ("evaluate", "--variant", "baseline"),
    ("evaluate", "--variant", "tuned"),
    ("export",),
    ("generate", "--variant", "exported"),
    ("evaluate", "--variant", "exported"),
    ("compare",),
    ("report",),
]


def split(preset: Path, folder: Path) -> Path:
    """A copy of a keras-hub preset with its weights in several files, as Keras writes those of large models."""
    import keras_hub

    shutil.copytree(preset, folder)
    (folder / "model.weights.h5").unlink()
    backbone = keras_hub.models.Backbone.from_preset(str(preset), dtype="float32")
    backbone.save_to_preset(str(folder), max_shard_size=0.0002)
    assert len(list(folder.glob("model_*.weights.h5"))) > 1
    return folder


FORMS = {
    "gemma": split,
    "gemma2": lambda preset, folder: write_hugging_face(preset, folder, "gemma2", files=2),
    "gemma3": split,
    "gemma4": split,
    "E2B": lambda preset, folder: write_hugging_face(preset, folder, "gemma4"),
}
"""The form in which a family goes through every stage; its single keras-hub file is loaded and measured beside it."""


def measured(folder: Path, name: str) -> dict:
    return json.loads((folder / "data" / "metrics" / f"{name}.json").read_text())


@pytest.mark.parametrize("family", [*FAMILIES, "E2B"])
def test_a_family_goes_through_every_stage_in_each_form(family, presets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path / "cache"))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "reviews.txt").write_text("\n".join(review.replace("\n", " ") for review in tiny_reviews(12)) + "\n")
    change(tmp_path, "fetch", source="huggingface", preset=f"hf://{REPO}")
    change(tmp_path, "prepare", source="files", train_file="reviews.txt", validation=4, min_characters=1)
    change(tmp_path, "tokenize", length=32)
    change(tmp_path, "mesh", shape=[1, 2])
    change(tmp_path, "finetune", batch_size=2, steps=3, learning_rate=0.01, schedule="constant", warmup_steps=0)
    change(tmp_path, "finetune", sample_every=None, checkpoint_every=None)
    # What export writes is one more variant: it must be the tuned model.
    change(tmp_path, "variants", exported="models/export/peft")
    change(tmp_path, "generate", max_tokens=3, prompts=["This movie was"])
    change(tmp_path, "export", formats=["peft", "gguf"], gguf_type="F32")

    preset = presets.get(family) or write_tiny_preset(tmp_path / "preset", "gemma4", **EDGE[family])
    folder = FORMS[family](preset, tmp_path / "original")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with hub_server.serving(hub_server.Hub(REPO, files)) as hub:
        environment = os.environ | hub_server.hub_environment(hub.url, tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        # The client reads its environment once, when it is imported.
        subprocess.run([warm.python(), "-m", "stages.fetch"], env=environment, check=True, capture_output=True)
    shutil.rmtree(folder)
    succeed("prepare")
    for stage in STAGES:
        succeed(*stage)
    baseline, tuned = measured(tmp_path, "evaluate/baseline"), measured(tmp_path, "evaluate/tuned")
    assert math.isfinite(tuned["loss"])
    assert tuned["loss"] < baseline["loss"]
    compared = measured(tmp_path, "compare")
    assert compared["loss_difference"] == pytest.approx(tuned["loss"] - baseline["loss"], abs=2e-5)
    assert compared["variants"]["exported"]["loss_difference"] == pytest.approx(compared["loss_difference"], abs=2e-5)
    texts = [(tmp_path / f"data/generated/{name}.jsonl").read_text() for name in ("tuned", "exported")]
    assert texts[0] == texts[1]
    assert (tmp_path / "data/report/index.html").stat().st_size > 10_000

    # The same weights in one file give the same model.
    change(tmp_path, "fetch", source="path", preset="tiny", path=str(preset))
    succeed("fetch")
    succeed("load")
    succeed("evaluate", "--variant", "baseline")
    assert measured(tmp_path, "evaluate/baseline") == baseline
