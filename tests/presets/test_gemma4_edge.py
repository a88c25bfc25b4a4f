"""Gemma 4's small sizes on disk: tensors that stand in files unread, and configurations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stages.core.common.errors import StageError
from stages.core.export.hugging_face_config import write_config
from stages.core.fetch import catalog
from stages.core.fetch.local import fetch_local
from stages.core.presets.formats import format_of
from tests.support.hf_folder import write_hugging_face
from tests.support.tiny_models import same_weights
from tests.support.tiny_presets import CONFIGS, EDGE, write_tiny_preset


@pytest.fixture(scope="module")
def preset(devices, tmp_path_factory) -> Path:
    return write_tiny_preset(tmp_path_factory.mktemp("edge") / "E2B", "gemma4", **EDGE["E2B"])


@pytest.fixture
def folder(preset, tmp_path) -> Path:
    """A plain checkpoint of a model with towers."""
    folder = write_hugging_face(preset, tmp_path / "hf", "gemma4", prefix="model.language_model.")
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "gemma4_text"}
    outer = {"model_type": "gemma4", "text_config": text, "vision_config": {"hidden_size": 16}, "audio_config": {}}
    (folder / "config.json").write_text(json.dumps(outer))
    towers = {"model.audio_tower.x.weight": np.ones((4, 4), "f4"), "model.embed_audio.x.weight": np.ones(4, "f4")}
    save_file(load_file(folder / "model.safetensors") | towers, folder / "model.safetensors")
    return folder


def add(folder: Path, *names: str) -> None:
    tensors = {
        f"model.language_model.layers.{name}.weight": np.ones((16, CONFIGS["gemma4"]["hidden_dim"]), "f4")
        for name in names
    }
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")


def test_keys_of_blocks_that_share_others_may_stand_in_the_files_and_are_not_read(folder, preset, tmp_path):
    add(folder, "2.self_attn.k_proj", "2.self_attn.v_proj", "3.self_attn.k_norm")
    fetch_local("tiny", "hf", tmp_path)
    assert same_weights(folder, "safetensors", preset)
    add(folder, "2.self_attn.k_bias")
    with pytest.raises(StageError, match="does not have"):
        fetch_local("tiny", "hf", tmp_path)


@pytest.mark.parametrize(
    ("name", "parameters"), [("gemma4_2b", 4_628_569_344), ("gemma4_4b", 7_463_013_376)], ids=["E2B", "E4B"]
)
def test_the_configuration_that_is_written_is_the_model_of_the_table_also_for_transformers(tmp_path, name, parameters):
    architecture = catalog.architecture(name)
    write_config(tmp_path, architecture, "bfloat16")
    assert format_of("safetensors").read_architecture(tmp_path).kinds == architecture.kinds
    torch = pytest.importorskip("torch", reason="needs torch (requirements-readers.txt)")
    transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-readers.txt)")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert model.num_parameters() == parameters
