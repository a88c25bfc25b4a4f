"""Hugging Face folders of the three families are read as keras-hub's own weights, slice by slice."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stages.core.common.errors import ParamsError, StageError
from stages.core.fetch import catalog
from stages.core.fetch.local import fetch_local, folder_format
from stages.core.presets.formats import format_of
from stages.core.presets.hf_config import read_architecture
from stages.core.presets.safetensors import SafetensorsWeights
from stages.core.presets.tokenizer import holds_vocabulary
from tests.data import record_configs
from tests.support import tiny_presets, tokenizer_json
from tests.support.hf_folder import change_config, config_of, hugging_face_files, write_hugging_face
from tests.support.repository import FAMILIES
from tests.support.tiny_models import load_tiny

BATCH = {
    "token_ids": np.random.default_rng(0).integers(4, 512, (2, 24)).astype(np.int32),
    "padding_mask": np.ones((2, 24), np.int32),
    "position_ids": np.tile(np.arange(24, dtype=np.int32), (2, 1)),
}


@pytest.fixture(scope="module")
def folders(presets, tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("hugging_face")
    return {family: write_hugging_face(presets[family], base / family, family) for family in FAMILIES}


@pytest.fixture
def copy(folders, tmp_path):
    """Copies of a tiny folder, to be spoilt."""
    return lambda family="gemma": Path(shutil.copytree(folders[family], tmp_path / "copy"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 4)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_the_same_as_in_the_keras_hub_preset(presets, folders, family, shape):
    import keras_hub

    wanted = keras_hub.models.Backbone.from_preset(str(presets[family]), dtype="float32")
    model = load_tiny(folders[family], shape)
    assert [each.path for each in model.backbone.weights] == [each.path for each in wanted.weights]
    for ours, theirs in zip(model.backbone.weights, wanted.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(ours.value), np.asarray(theirs.value), err_msg=ours.path)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_keras_hubs_own_converter(folders, family):
    import keras_hub

    theirs = keras_hub.models.Backbone.from_preset(str(folders[family]), dtype="float32")
    # Gemma 4 takes positions too.
    batch = {name: each for name, each in BATCH.items() if name in theirs.input}
    wanted = np.asarray(theirs(batch))
    model = load_tiny(folders[family], (1, 4))
    np.testing.assert_allclose(np.asarray(model.backbone(batch)), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_architecture_is_what_keras_hubs_own_converter_makes_of_it(folders, family):
    import keras_hub

    theirs = keras_hub.models.Backbone.from_preset(str(folders[family]), load_weights=False)
    ours = read_architecture(folders[family])
    assert ours.class_name == type(theirs).__name__
    config = theirs.get_config()
    # keras-hub keeps the size of images, and of a table for each block, where there is none of these.
    unread = {"image_size"} | (
        {"vocab_size_per_layer_input"} if not config.get("hidden_size_per_layer_input") else set()
    )
    for key, value in ours.config.items():
        assert key in unread or config[key] == value, key


def test_a_gemma_3_of_several_files_in_bfloat16_is_read_as_one(presets, tmp_path):
    folder = write_hugging_face(presets["gemma3"], tmp_path / "split", "gemma3", files=3, dtype="bfloat16")
    whole = load_tiny(presets["gemma3"], (1, 1)).backbone.weights
    for ours, exact in zip(load_tiny(folder, (1, 8)).backbone.weights, whole, strict=True):
        rounded = np.asarray(exact.value).astype(ml_dtypes.bfloat16).astype("float32")
        np.testing.assert_array_equal(np.asarray(ours.value), rounded, err_msg=ours.path)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_gemma_3_with_vision_the_text_tower_is_read(presets, tmp_path, prefix):
    folder = write_hugging_face(presets["gemma3"], tmp_path / "vision", "gemma3", prefix=prefix)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {"image_size": 896}})
    )
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"vision_tower.patch.weight": np.ones((2, 2), "f4")}, path)
    wanted = load_tiny(presets["gemma3"], (1, 1)).backbone.weights
    for ours, theirs in zip(load_tiny(folder, (2, 4)).backbone.weights, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(ours.value), np.asarray(theirs.value), err_msg=ours.path)


@pytest.mark.parametrize("path", ["query", "attention_output"])
def test_any_slice_of_a_kernel_is_that_of_the_whole(folders, path):
    weights = SafetensorsWeights(folders["gemma3"])
    name = f"decoder_block_1/attention/{path}/kernel"
    whole = weights.read(name, (slice(None),) * 3)
    assert whole.shape == weights.shape(name)
    for index in (np.s_[1:3, :, :], np.s_[:, 5:9, :], np.s_[:, :, 4:12], np.s_[2:4, 3:4, 1:2]):
        np.testing.assert_array_equal(weights.read(name, index), whole[index])
    weights.close()


def test_a_file_that_is_closed_and_opened_again_between_reads_gives_the_same(presets, folders, monkeypatch):
    monkeypatch.setattr("stages.core.presets.safetensors.BYTES_AN_OPENING", 0)
    wanted = load_tiny(presets["gemma2"], (1, 1)).backbone.weights
    for ours, theirs in zip(load_tiny(folders["gemma2"], (1, 4)).backbone.weights, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(ours.value), np.asarray(theirs.value), err_msg=ours.path)


def test_the_sizes_that_gemma_3s_public_files_leave_out_are_the_librarys(copy):
    folder = copy("gemma3")
    config = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    config |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    # The text tower of the model with vision has 64 words more than the text preset, and keras-hub's defaults unsaid.
    ours, public = read_architecture(folder).config, catalog.architecture("gemma3_4b_text").config
    assert ours["vocabulary_size"] == 262208
    assert {key: ours[key] for key in public if key != "vocabulary_size"} == {
        key: value for key, value in public.items() if key != "vocabulary_size"
    }


def test_the_27b_models_scaling_of_queries_and_the_newer_form_of_rope_are_read(copy):
    folder = change_config(copy("gemma3"), query_pre_attn_scalar=16 * 4, hidden_size=16 * 16, rope_scaling=None)
    change_config(
        folder,
        rope_theta=None,
        rope_local_base_freq=None,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        layer_types=["sliding_attention", "sliding_attention"],
    )
    config = read_architecture(folder).config
    assert config["query_head_dim_normalize"] is False
    assert (config["local_rope_scaling_factor"], config["global_rope_scaling_factor"]) == (1.0, 8.0)


REFUSED = {
    "another model": ({"model_type": "llama"}, "text Gemma"),
    "quantized weights": (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        "quantization_config='bitsandbytes'",
    ),
    "a size that is text": ({"num_hidden_layers": "abc"}, "num_hidden_layers='abc'"),
    "more layers than any Gemma": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0"),
    "heads that keys do not divide": ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_query_heads=4"),
    "a cap of zero": ({"final_logit_softcapping": 0}, "final_logit_softcapping=0"),
    "another epsilon": ({"rms_norm_eps": 1e-2}, "layer_norm_epsilon=0.01"),
    "looking ahead": ({"is_causal": False}, "is_causal=True"),
    "an older name of the activation": ({"hidden_act": "silu"}, "hidden_act=gelu_pytorch_tanh"),
    "dropout in its attention": ({"attention_dropout": 0.1}, "attention_dropout=0"),
    "a head that classifies": (
        {"architectures": ["Gemma3ForSequenceClassification"]},
        "architectures=Gemma",
    ),
    "a key that nobody knows": ({"residual_multiplier": 0.5}, "residual_multiplier=0.5"),
    "a scaling that is text": ({"rope_scaling": "x"}, "rope_scaling='x'"),
    "a scaling of no kind": ({"rope_scaling": {"factor": 8.0}}, "a rope_type with its factor"),
    "another activation": ({"hidden_activation": "relu"}, "hidden_activation=gelu_pytorch_tanh"),
    "a bias": ({"attention_bias": True}, "attention_bias=False"),
    "a head of its own": ({"tie_word_embeddings": False}, "tie_word_embeddings=True"),
    "an embedding model": ({"use_bidirectional_attention": True}, "use_bidirectional_attention=False"),
    "another scaling of queries": ({"query_pre_attn_scalar": 17}, "query_pre_attn_scalar=16 (head_dim)"),
    "other layers": ({"layer_types": ["full_attention"] * 2}, "layer_types=every 6th full_attention"),
    "other windows": ({"sliding_window_pattern": 5}, "sliding_window_pattern=6"),
    "another wavelength": ({"rope_theta": 500000.0}, "rope_theta of full_attention=1e+06"),
    "another scaling of positions": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn by 2.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_keras_hubs_gemma_cannot_express_is_refused_when_the_preset_is_fetched(copy, case):
    change, message = REFUSED[case]
    folder = change_config(copy("gemma3"), **change)
    with pytest.raises(StageError, match=re.escape(message)):
        format_of("safetensors").read_architecture(folder)
    with pytest.raises(ParamsError, match=re.escape(message)):
        fetch_local("mine", str(folder), folder)


def test_a_truncated_file_is_told(copy):
    path = copy() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StageError, match=r"model\.safetensors must be a complete safetensors file"):
        load_tiny(path.parent, (1, 1))


def edit(folder: Path, change) -> Path:
    """Change the tensors of a folder's only file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_missing_tensor_is_named_with_the_weight_it_is_for(copy):
    folder = edit(copy(), lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        StageError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \(for decoder_block_1/ffw_gating_2/k"
    ):
        load_tiny(folder, (1, 1))


def test_beside_a_missing_tensor_the_nearest_that_is_there_is_named(copy):
    # As PEFT names the weights that its adapters are beside.
    name = "model.layers.1.self_attn.q_proj"
    folder = edit(copy(), lambda tensors: tensors.update({f"{name}.base_layer.weight": tensors.pop(f"{name}.weight")}))
    with pytest.raises(ParamsError, match=rf"must hold {name}\.weight .* Received: .*q_proj\.base_layer\.weight"):
        fetch_local("mine", str(folder), folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
            },
            r"the same in rope_scaling and rope_parameters of full_attention\. Received: .*8\.0.* and .*4\.0",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            r"must state one rope_theta of full_attention\. Received: 10000 and 1000000$",
        ),
        (
            {"rope_local_base_freq": 1e6, "rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}},
            r"must state one rope_theta of sliding_attention",
        ),
    ],
    ids=["the factor", "the wavelength", "the wavelength of windowed layers"],
)
def test_a_configuration_that_says_two_things_of_its_rotary_embeddings_is_refused(tmp_path, changes, said):
    config = config_of("gemma3", tiny_presets.CONFIGS["gemma3"]) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match=said):
        read_architecture(tmp_path)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy):
    wrong = np.zeros((64, 32), "f4")
    folder = edit(copy(), lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.weight": wrong}))
    with pytest.raises(StageError, match=r"o_proj\.weight .* \(64, 64\) .* Received: shape=\(64, 32\)"):
        load_tiny(folder, (1, 1))


def test_a_file_that_the_index_names_and_is_not_there_is_told_at_fetch_and_at_load(presets, tmp_path):
    folder = write_hugging_face(presets["gemma"], tmp_path / "split", "gemma", files=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ParamsError, match=r"Missing: model-00002-of-00002\.safetensors"):
        fetch_local("mine", str(folder), folder)
    with pytest.raises(StageError, match=r"model-00002-of-00002\.safetensors must be a complete"):
        SafetensorsWeights(folder)


def test_a_folder_without_weights_or_vocabulary_is_told_at_fetch(copy):
    folder = copy()
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ParamsError, match=r"must hold tokenizer\.model"):
        fetch_local("mine", str(folder), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ParamsError, match=r"must hold model\.safetensors, or model\.safetensors\.index\.json"):
        fetch_local("mine", str(folder), folder)


def test_the_manifest_knows_the_two_kinds_of_folder_apart(presets, folders):
    assert folder_format(folders["gemma"]) == "safetensors"
    assert folder_format(presets["gemma"]) == "keras"


def test_the_vocabulary_is_the_same_as_in_the_keras_hub_preset(presets, folders):
    text = "The movie was 4 out of 10.\n\nSee it!"
    ours = format_of("safetensors").load_tokenizer(folders["gemma3"])
    assert ours.encode(text) == format_of("keras").load_tokenizer(presets["gemma3"]).encode(text)
    assert holds_vocabulary("tokenizer.model")
    with pytest.raises(StageError, match=r"a tokenizer\.json as transformers writes it"):
        format_of("safetensors").load_tokenizer(presets["gemma3"])


@pytest.fixture
def small(tmp_path) -> Path:
    """The smallest folder, made without Keras."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name, content in hugging_face_files().items():
        (folder / name).write_bytes(content)
    return folder


TABLE = "model.embed_tokens.weight"
STRANGE = {
    "another head": ({"lm_head.weight": lambda table: table + 1}, "lm_head.weight in model.safetensors, which differs"),
    "a head of another size": ({"lm_head.weight": lambda table: table[:-1]}, "lm_head.weight"),
    "codes": ({TABLE: lambda table: table.astype("i1")}, f"not quantized. Received: {TABLE} of I8"),
    "a classifier": ({"score.weight": lambda table: table[:2]}, "Received: score.weight"),
    "scales": ({"model.layers.0.mlp.up_proj.weight_scale": lambda table: table[0]}, "up_proj.weight_scale"),
    "an adapter": ({"model.layers.0.self_attn.q_proj.lora_A.weight": lambda table: table}, "that was not merged"),
    "more layers": ({"model.layers.2.mlp.up_proj.weight": lambda table: table}, "Received: model.layers.2.mlp.up_proj"),
    "vision": ({"vision_tower.patch.weight": lambda table: table}, "Received: vision_tower.patch.weight"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_tensor_that_would_be_left_out_or_misread_is_named_at_fetch(small, case):
    changes, said = STRANGE[case]
    edit(small, lambda tensors: tensors.update({name: make(tensors[TABLE]) for name, make in changes.items()}))
    with pytest.raises(ParamsError, match=re.escape(said)):
        fetch_local("mine", str(small), small)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_head_that_is_the_table_and_buffers_are_no_obstacle(small, dtype, monkeypatch):
    monkeypatch.setattr("stages.core.presets.safetensors.BYTES_AN_OPENING", 1000)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, "f4")}
    edit(small, lambda tensors: tensors.update(extra | {"lm_head.weight": tensors[TABLE].astype(dtype)}))
    fetch_local("mine", str(small), small)


@pytest.mark.parametrize("wrapper", ["module.", "base_model.model.", "_orig_mod."])
def test_names_in_a_wrapper_are_told_as_they_are(small, wrapper):
    def wrap(tensors):
        for name in list(tensors):
            tensors[wrapper + name] = tensors.pop(name)

    with pytest.raises(ParamsError, match=rf"Received: {wrapper}model\.embed_tokens\.weight"):
        fetch_local("mine", str(edit(small, wrap)), small)


@pytest.mark.parametrize(
    "rows, fits", [(511, False), (512, True), (576, True), (767, True), (768, False), (6656, False)]
)
def test_the_table_has_the_rows_that_the_vocabulary_needs_and_few_more(small, rows, fits):
    change_config(small, vocab_size=rows)
    edit(small, lambda tensors: tensors.update({TABLE: np.ones((rows, tensors[TABLE].shape[1]), "f4")}))
    if fits:
        fetch_local("mine", str(small), small)
    else:
        with pytest.raises(ParamsError, match=rf"512 pieces, {rows:,} rows"):
            fetch_local("mine", str(small), small)


def test_a_folder_of_transformers_5_has_a_tokenizer_json_alone(small):
    proto = (small / "tokenizer.model").read_bytes()
    (small / "tokenizer.model").unlink()
    (small / "tokenizer.json").write_text(json.dumps(tokenizer_json.tokenizer_json(proto, added=())))
    manifest = fetch_local("mine", str(small), small)
    assert [file.name for file in manifest.files] == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_key_that_is_left_out_means_transformers_default(small):
    config = change_config(small, model_type="gemma2", rope_scaling=None, rope_local_base_freq=None, rope_theta=None)
    change_config(config, sliding_window_pattern=None, sliding_window=None, head_dim=None, query_pre_attn_scalar=None)
    found = read_architecture(small).config
    assert (found["final_logit_soft_cap"], found["attention_logit_soft_cap"]) == (30, 50)
    assert (found["sliding_window_size"], found["head_dim"]) == (4096, 256)


def test_a_factor_beside_the_plain_form_of_rope_scales_nothing(small):
    change_config(small, rope_scaling={"rope_type": "default", "factor": 8.0})
    assert read_architecture(small).config["global_rope_scaling_factor"] == 1.0


def test_a_tensor_that_two_files_hold_is_refused(small):
    for name, content in hugging_face_files(files=2).items():
        (small / name).write_bytes(content)
    (small / "model.safetensors").replace(small / "model-00002-of-00002.safetensors")
    with pytest.raises(ParamsError, match="Each tensor must lie in one file"):
        fetch_local("mine", str(small), small)


# As Google's own files have them, written by transformers 4.
PUBLIC = {
    "gemma-2b": {
        **{"architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2},
        **{"eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048},
        **{"initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192, "use_cache": True},
        **{"model_type": "gemma", "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1},
        **{"pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000},
        **{"torch_dtype": "bfloat16", "transformers_version": "4.38.1"},
    },
    "gemma-3-270m": {
        **{"_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False},
        **{"attention_dropout": 0.0, "attn_logit_softcapping": None, "eos_token_id": [1, 106], "head_dim": 256},
        **{"final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640},
        **{"intermediate_size": 2048, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3},
        **{"model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1},
        **{"query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0, "rope_scaling": None},
        **{"rope_theta": 1000000.0, "sliding_window": 512, "use_bidirectional_attention": False, "vocab_size": 262144},
    },
}


def test_what_transformers_writes_of_each_family_is_read(tmp_path):
    recorded = json.loads(record_configs.RECORDED.read_text())
    assert len(recorded) == 8
    for name, config in (recorded | PUBLIC).items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = format_of("safetensors").read_architecture(tmp_path).config
        text = config.get("text_config", config)
        default = 262208 if "Gemma3" in name else 256000
        assert found["vocabulary_size"] == text.get("vocab_size", default), name
