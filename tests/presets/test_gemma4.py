"""What sets presets of Gemma 4 apart: towers beside the text model, and a vocabulary of their own."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stages.core.common.errors import ParamsError, StageError
from stages.core.fetch.local import fetch_local
from stages.core.presets.formats import format_of
from stages.core.presets.hf_config import read_architecture
from stages.core.presets.tokenizer import KERAS_VOCABULARY
from tests.support.hf_folder import change_config, write_hugging_face
from tests.support.tiny_models import load_tiny, same_weights
from tests.support.tiny_presets import (
    CONFIGS,
    EDGE,
    EXPERTS,
    TURNS_OF_GEMMA4,
    tiny_backbone,
    tiny_proto,
    write_tiny_preset,
)

TOLD = "the preset has a vision tower, whose weights are not read: only its text model is used."


@pytest.mark.parametrize("kind", [{}, EDGE["E2B"]], ids=["31B", "E2B"])
def test_a_keras_preset_with_a_vision_tower_is_its_text_model(devices, tmp_path, kind, logged):
    import keras_hub

    preset, hidden = write_tiny_preset(tmp_path / "text", "gemma4", **kind), CONFIGS["gemma4"]["hidden_dim"]
    sizes = {"image_size": 16, "patch_size": 4, "pool_size": 2, "num_layers": 1, "num_heads": 2, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "hidden_dim": 16, "intermediate_dim": 16, "position_embedding_size": 16}
    tower = keras_hub.models.Gemma4VisionEncoder(**sizes, output_dim=hidden)
    config = {**CONFIGS["gemma4"], **kind, "image_size": 16, "vision_encoder": tower, "dtype": "float32"}
    seeing = keras_hub.models.Gemma4Backbone(**config)
    values = {weight.path: weight for weight in tiny_backbone("gemma4", **kind).weights}
    for weight in seeing.weights:
        if weight.path in values:
            weight.assign(values[weight.path])
    shutil.copytree(preset, tmp_path / "seeing")
    seeing.save_to_preset(str(tmp_path / "seeing"))
    fetch_local("tiny", "seeing", tmp_path)
    assert TOLD in logged()
    assert same_weights(tmp_path / "seeing", "keras", preset)


def test_a_hugging_face_checkpoint_with_a_vision_tower_is_its_text_model(presets, tmp_path, logged):
    folder = write_hugging_face(presets["gemma4"], tmp_path / "hf", "gemma4", prefix="model.language_model.")
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "gemma4_text"}
    outer = {"model_type": "gemma4", "text_config": text, "vision_config": {"hidden_size": 16}, "audio_config": None}
    built = {"architectures": ["Gemma4ForConditionalGeneration"], "boa_token_id": 256000, "video_token_id": 258884}
    (folder / "config.json").write_text(json.dumps(outer | built | {"tie_word_embeddings": True}))
    tower = {"model.vision_tower.patch.weight": np.ones((4, 4), "f4"), "model.embed_vision.x.weight": np.ones(4, "f4")}
    save_file(load_file(folder / "model.safetensors") | tower, folder / "model.safetensors")
    fetch_local("tiny", "hf", tmp_path)
    assert TOLD in logged()
    assert same_weights(folder, "safetensors", presets["gemma4"])


@pytest.mark.parametrize(("family", "turns"), [("gemma4", None), ("gemma3", TURNS_OF_GEMMA4)])
def test_a_vocabulary_of_another_family_is_refused(presets, tmp_path, family, turns):
    shutil.copytree(presets[family], tmp_path / "preset")
    (tmp_path / "preset" / KERAS_VOCABULARY).write_bytes(tiny_proto(*([turns] if turns else [])))
    with pytest.raises(ParamsError, match=r"(?s)of the model's family.*Take the tokenizer's files") as caught:
        fetch_local("tiny", "preset", tmp_path)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json", "several"])
def test_a_chat_template_of_another_family_is_refused(presets, tmp_path, family, file):
    turns = {"gemma3": "<start_of_turn>", "gemma4": "<|turn>"}
    folder = shutil.copytree(presets[family], tmp_path / "preset")

    def write(template: str) -> None:
        content = [{"name": "default", "template": template}] if file == "several" else template
        if file == "chat_template.jinja":
            (folder / file).write_text(template)
        else:
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": content}))

    write(f"{{{{ '{turns[family]}user' }}}}")
    fetch_local("tiny", "preset", tmp_path)
    (other,) = turns.keys() - {family}
    write(f"{{{{ '{turns[other]}user' }}}}")
    with pytest.raises(ParamsError, match=r"(?s)chat template must be of the model's family.*Take the") as caught:
        fetch_local("tiny", "preset", tmp_path)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("thought", [True, False])
def test_a_template_that_opens_answers_otherwise_than_ours_is_told(presets, tmp_path, thought, logged):
    folder = shutil.copytree(presets["gemma4"], tmp_path / "preset")
    empty = r"<|channel>thought\n<channel|>" if thought else ""
    (folder / "chat_template.jinja").write_text(f"{{{{ '<|turn>model{empty}' }}}}")
    fetch_local("tiny", "preset", tmp_path)
    assert thought != any("no empty thought before an answer. Google's" in line for line in logged())


@pytest.mark.parametrize("kind", ["gemma4_assistant", "gemma4_unified_assistant"])
def test_an_assistant_is_refused_with_the_reason(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "text_config": {}}))
    with pytest.raises(StageError, match="an assistant only drafts tokens for another model"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"enable_moe_block": True, "num_experts": 4}, "must state num_experts, top_k_experts and moe_intermediate"),
        ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 8}, "vocab_size_per_layer_input"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"attention_k_eq_v": False, "per_layer_config": {"1": {"num_key_value_heads": 1}}}, "attention_k_eq_v: true"),
        ({"per_layer_config": {"0": {"head_dim": 32}}}, "must give all layers of full attention"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "must state rope_theta"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_computes_something_else_is_refused(presets, tmp_path, change, said):
    folder = write_hugging_face(presets["gemma4"], tmp_path / "hf", "gemma4")
    with pytest.raises(StageError, match=said):
        read_architecture(change_config(folder, **change))


def test_experts_are_the_same_in_a_hugging_face_checkpoint_whole_and_in_slices(devices, tmp_path):
    preset = write_tiny_preset(tmp_path / "keras", "gemma4", **EXPERTS)
    folder = write_hugging_face(preset, tmp_path / "hf", "gemma4")
    assert read_architecture(folder).kinds == format_of("keras").read_architecture(preset).kinds
    assert same_weights(folder, "safetensors", preset)
    architecture, cut = read_architecture(folder), (slice(1, 3), slice(5, 60), slice(7, 20))
    with (
        format_of("safetensors").open_weights(folder, architecture) as found,
        format_of("keras").open_weights(preset, architecture) as wanted,
    ):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            path = f"decoder_block_1/moe_expert_bank/{matrix}"
            index = cut if matrix != "down_proj" else (cut[0], cut[2], cut[1])
            assert np.array_equal(found.read(path, index), wanted.read(path, index)), matrix


def test_what_transformers_5_writes_of_full_attention_says_the_same(presets, tmp_path):
    folder = write_hugging_face(presets["gemma4"], tmp_path / "hf", "gemma4")
    wanted = read_architecture(folder)
    sizes = {"head_dim": 32, "num_key_value_heads": 1}
    newer = change_config(folder, global_head_dim=None, num_global_key_value_heads=None, per_layer_config={"1": sizes})
    assert read_architecture(newer) == wanted
    assert wanted.kinds == format_of("keras").read_architecture(presets["gemma4"]).kinds


def test_a_block_s_own_number_is_loaded(presets, tmp_path):
    """It is a single number, which NumPy's contiguous arrays would make a vector of."""
    model = load_tiny(write_tiny_preset(tmp_path / "other", "gemma4", seed=3), (1, 2))
    values = [float(layer.layer_scalar.value) for layer in model.backbone.transformer_layers]
    expected = [float(layer.layer_scalar.value) for layer in tiny_backbone("gemma4", seed=3).transformer_layers]
    assert values == expected and len(set(values)) == 2
