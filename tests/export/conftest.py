"""A tiny tuned model of each family, with an adapter on every layer and with every weight trained, and its logits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest

from stages.core.config.reader import read_params
from stages.core.config.schema import Export
from stages.core.export import proof
from stages.core.export.card import Facts
from stages.core.export.formats import make_job
from stages.core.export.tuned import TrainedWeights, Tuned
from stages.core.load import adapter
from stages.core.presets.formats import format_of
from stages.core.records.evaluate import CompareMetrics, EvaluateMetrics
from stages.core.records.generate import Generation
from stages.core.records.layout import LoraConfig
from stages.core.records.prepare import PrepareMetrics
from tests.support.repository import FAMILIES, ROOT
from tests.support.tiny_models import load_tiny
from tests.support.tiny_presets import write_tiny_preset
from tests.support.tuned_models import EVERY_KIND, logits, tuned


@dataclass
class Case:
    """A tuned model, the ids of the text that proofs read, its logits there and the base's, by the pipeline's pass."""

    family: str
    tuned: Tuned
    ids: list[int]
    logits: np.ndarray
    base: np.ndarray

    def job(self, *formats: str, chat: bool = False, **changes: str):
        """What is exported, with these settings."""
        settings = {"base": "text", "dtype": "float32", "gguf_type": "F32", **changes}
        return make_job(self.tuned, Export(formats=list(formats) or ["peft"], **settings), chat)


def in_full(model: Tuned, folder) -> Tuned:
    """The same preset with every weight trained."""
    random = np.random.default_rng(1)
    with model.open_merged() as weights:
        arrays = {
            path: weights.read(path, tuple(slice(0, size) for size in each.shape))
            for path, each in weights.table.items()
            if each.shape  # what Gemma 4 multiplies a block with is never trained
        }
    arrays = {path: (each + random.normal(0, 0.02, each.shape)).astype("f4") for path, each in arrays.items()}
    adapter.save(folder / "weights.safetensors", arrays, {"base": model.preset.fingerprint, "preset": "tiny"})
    return dataclasses.replace(model, trained=TrainedWeights(folder / "weights.safetensors"), lora=LoraConfig(0))


def read_whole(model: Tuned, ids: list[int]) -> np.ndarray:
    """The logits of a model with every weight trained, by the pipeline's pass over Keras' own variables."""
    loaded = load_tiny(model.preset.folder, (1, 1))
    for variable in (each for each in loaded.backbone.weights if each.path in model.trained):
        variable.assign(model.trained.array(variable.path))
    return logits(loaded, ids)


@pytest.fixture(scope="session")
def facts() -> Facts:
    """What was measured of a run, a sample with a fence and a terminal's escape among it."""
    held_out = {"targets": 12855, "reviews": 40, "reviews_cut": 0, "targets_cut": 0, "loss_standard_error": 0.07}
    counts = {"reviews_read": 200, "empty": 0, "too_short": 0, "duplicates": 0, "other_conversations": 0}
    return Facts(
        finetune=read_params(ROOT / "params.yaml").finetune,
        source="imdb_sample",
        prepare=PrepareMetrics(**counts, changed=126, train_reviews=160, validation_reviews=40, characters_mean=1200.0),
        evaluate={
            "baseline": EvaluateMetrics(loss=3.43867, perplexity=31.1456, token_accuracy=0.36888, **held_out),
            "tuned": EvaluateMetrics(loss=3.36536, perplexity=28.9439, token_accuracy=0.37433, **held_out),
        },
        compare=CompareMetrics(
            loss_difference=-0.07332,
            loss_difference_standard_error=0.0076,
            perplexity_ratio=0.92931,
            token_accuracy_difference=0.00545,
            token_accuracy_difference_standard_error=0.00223,
            targets=12855,
            reviews=40,
        ),
        samples={name: [Generation(prompt="It", text="````\x1b[31m<script>")] for name in ("baseline", "tuned")},
        missing=[],
    )


@pytest.fixture(scope="session")
def cases(devices, tmp_path_factory) -> dict[tuple[str, str], Case]:
    """By family, and `lora` or `full`."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        preset = write_tiny_preset(folder / "preset", family, **EVERY_KIND[family])
        loaded, model = tuned(preset, folder)
        tokenizer = format_of("keras").load_tokenizer(preset)
        ids = proof.text_ids(tokenizer, model.preset.architecture)
        base = logits(load_tiny(preset, (1, 1)), ids)
        made[family, "lora"] = Case(family, model, ids, logits(loaded, ids), base)
        whole = in_full(model, folder)
        made[family, "full"] = Case(family, whole, ids, read_whole(whole, ids), base)
    return made
