"""Training that goes on from an adapter (`finetune.start_from`): of ours, or in PEFT's form."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from stages.core.adapters.start import digest, start_folder
from stages.core.common.errors import ParamsError, StageError
from stages.core.common.paths import Paths
from stages.core.export.adapter import common_rank, lora_modules, peft_tensors
from stages.core.finetune import trainer
from stages.core.load import adapter
from tests.support.tiny_models import describe
from tests.support.tiny_runs import settings
from tests.support.tuned_models import tuned

pytestmark = pytest.mark.usefixtures("devices")
TARGETS = ("query", "attention_output")


@pytest.fixture(scope="module")
def before(presets, tmp_path_factory):
    """A tuned Gemma 2 of rank 3 and alpha 6, its folder as in `models/tuned`, and another in PEFT's form."""
    own, theirs = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("peft")
    _, model = tuned(presets["gemma2"], own, TARGETS)
    said = {"base": model.preset.fingerprint, "preset": "tiny", **model.config.tuned.model_dump()}
    adapter.save(own / "adapter.safetensors", {path: model.trained.array(path) for path in model.trained}, said)
    modules = lora_modules(model)
    tensors = {f"base_model.model.{name}": values for name, values in peft_tensors(model, modules)}
    save_file(tensors, theirs / "adapter_model.safetensors")
    rank = common_rank(modules)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "o_proj"]}
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    return model, own, theirs


def start(model, folder, **changes):
    """The values that a run's adapter starts from."""
    wanted = settings(**{"rank": 3, "alpha": 6.0, "targets": list(TARGETS), **changes})
    loaded = trainer.load_trainable(model.preset, describe(model.preset, (1, 2)), wanted, folder)
    return trainer.trained_arrays(loaded)


@pytest.mark.parametrize("whose", [1, 2])
def test_a_run_starts_from_the_values_of_the_adapter(before, whose):
    model = before[0]
    found = start(model, before[whose])
    assert sorted(found) == sorted(model.trained)
    assert all(np.array_equal(found[path], model.trained.array(path)) for path in found)


@pytest.mark.parametrize("whose", [1, 2])
def test_with_another_alpha_the_model_is_the_same(before, whose):
    model = before[0]
    found = start(model, before[whose], alpha=1.5)
    for path, values in found.items():
        expected = model.trained.array(path) * (4.0 if path.endswith("_b") else 1.0)
        assert np.array_equal(values, expected.astype("f4")), path


@pytest.mark.parametrize("whose", [1, 2])
def test_another_rank_or_other_targets_are_refused_with_the_difference(before, whose):
    model, folder = before[0], before[whose]
    said = r"finetune\.start_from, 3\. Received: finetune\.rank=4|\nSet finetune\.rank to"
    with pytest.raises(StageError, match=said):
        start(model, folder, rank=4)
    with pytest.raises(StageError, match="lacks decoder_block_0/attention/key, decoder_block_1/attention/key"):
        start(model, folder, targets=[*TARGETS, "key"])
    with pytest.raises(StageError, match=r"also has decoder_block_0/attention/attention_output.*targets=\['query'\]"):
        start(model, folder, targets=["query"])


def test_an_adapter_of_another_base_is_refused_by_its_hash(before, tmp_path):
    model, own, _ = before
    arrays = {path: model.trained.array(path) for path in model.trained}
    said = {**adapter.describe(own / "adapter.safetensors"), "base": "f" * 64}
    adapter.save(tmp_path / "adapter.safetensors", arrays, said)
    with pytest.raises(StageError, match=r"of the base that it is put on, .*Received: one of tiny \(ffffffffffff\)"):
        start(model, tmp_path)


def test_the_folder_must_hold_an_adapter_and_not_be_the_stage_s_own_output(before, tmp_path):
    paths = Paths(tmp_path, tmp_path)
    assert start_folder(paths, None) is None
    assert start_folder(paths, str(before[1])) == before[1]
    (tmp_path / "models/tuned").mkdir(parents=True)
    with pytest.raises(ParamsError, match=r"must not be models/tuned(.|\n)*cp -r"):
        start_folder(paths, "models/tuned")
    with pytest.raises(ParamsError, match=r"must name a folder with adapter_config.json"):
        start_folder(paths, "models")


def test_what_the_files_hold_identifies_the_run(before, tmp_path):
    _, own, theirs = before
    assert digest(own) != digest(theirs)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in theirs.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert digest(copy) == digest(theirs)
    (copy / "adapter_config.json").write_text("{}")
    assert digest(copy) != digest(theirs)
