"""A Gemma 4 with experts in the formats of others: each read back, one of them by transformers."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from stages.core.export import exporting, proof
from stages.core.presets.formats import format_of
from tests.export.conftest import Case, in_full
from tests.support.tiny_models import keras_hub_reads, load_tiny
from tests.support.tiny_presets import EXPERTS, write_tiny_preset
from tests.support.tuned_models import logits, tuned


@pytest.fixture(scope="module")
def case(devices, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("experts")
    preset = write_tiny_preset(folder / "preset", "gemma4", **EXPERTS)
    loaded, model = tuned(preset, folder)
    ids = proof.text_ids(format_of("keras").load_tokenizer(preset), model.preset.architecture)
    return Case("gemma4", model, ids, logits(loaded, ids), logits(load_tiny(preset, (1, 1)), ids))


@pytest.fixture(scope="module")
def written(case, facts, tmp_path_factory):
    """A folder with all formats that a Gemma 4 has."""
    folder = tmp_path_factory.mktemp("written")
    with exporting.reference(case.job("peft", "huggingface", "keras", "gguf")) as compared:
        measured = exporting.export(compared, folder, facts)
    assert set(measured) == {"peft", "huggingface", "keras", "gguf"}
    assert all(each.logit_difference <= 3e-4 and each.same_choice_fraction == 1.0 for each in measured.values())
    return folder


def test_keras_hub_computes_the_tuned_model_s_logits(case, written):
    _, found = keras_hub_reads(written / "keras")(np.array([case.ids], "i4"))
    assert np.abs(np.asarray(found[0]) - case.logits).max() < 1e-3
    assert np.abs(case.base - case.logits).max() > 1


def test_transformers_computes_the_tuned_model_s_logits(case, written):
    # torch's compiler, which nothing here uses, ends the process where TensorFlow has been imported before it.
    sys.modules.setdefault("triton", None)
    torch = pytest.importorskip("torch", reason="needs torch (requirements-readers.txt)")
    transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-readers.txt)")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        written / "huggingface", dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        found = model.eval()(input_ids=torch.tensor([case.ids])).logits[0].numpy()
    assert np.abs(found - case.logits).max() < 1e-3


def test_trained_in_full_its_experts_are_written_as_trained(case, facts, tmp_path):
    whole = Case("gemma4", in_full(case.tuned, tmp_path), case.ids, case.logits, case.base)
    with exporting.reference(whole.job("huggingface", "keras")) as compared:
        measured = exporting.export(compared, tmp_path / "written", facts)
    assert all(each.logit_difference <= 3e-4 for each in measured.values())
