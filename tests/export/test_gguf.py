"""GGUF as export writes it, by our own reader: weights, vocabulary, and what is refused."""

from __future__ import annotations

import base64
import json
import tracemalloc

import gguf
import numpy as np
import pytest

from stages.core.common.errors import StageError
from stages.core.export.adapter import common_rank, lora_modules, peft_tensors
from stages.core.export.gguf import write_gguf
from stages.core.export.gguf_adapter import write_gguf_adapter
from stages.core.export.modelfile import modelfile
from stages.core.export.tensors import hugging_face_tensors
from stages.core.export.vocabulary import sentencepiece_model
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import format_of
from stages.core.presets.gguf_file import field_of, open_file
from stages.core.presets.json_vocabulary import model_of_json
from stages.core.presets.manifest import LICENSE
from stages.core.presets.weight_table import weight_table
from stages.core.tokenize.control_tokens import ControlTokens
from tests.support import tiny_presets, tokenizer_json
from tests.support.exported_gguf import SPELLED, SPELLED_OF_GEMMA4, TEXTS, written
from tests.support.tiny_models import open_tiny
from tests.support.tuned_models import MODELS, tuned

pytestmark = pytest.mark.usefixtures("devices")


@pytest.fixture(scope="module")
def tuned_models(devices, tmp_path_factory):
    """Of each family a tuned model with all kinds of blocks."""
    base = tmp_path_factory.mktemp("tuned")
    made = {}
    for name, (family, arguments) in MODELS.items():
        (base / name).mkdir()
        preset = tiny_presets.write_tiny_preset(base / name / "preset", family, **arguments)
        made[name] = tuned(preset, base / name)[1]
    return made


@pytest.mark.parametrize("name", MODELS)
def test_our_reader_finds_the_architecture_and_the_tuned_weights(tuned_models, tmp_path, name):
    model = tuned_models[name]
    written(model, tmp_path)
    form = format_of("gguf")
    read, original = form.read_architecture(tmp_path), model.preset.architecture
    assert read.class_name == original.class_name
    # What the tiny model does not state follows from what its blocks are.
    stated = {key: value for key, value in original.config.items() if value is not None}
    assert {key: read.config.get(key, value) for key, value in stated.items()} == stated
    assert read.kinds == original.kinds
    form.check_weights(tmp_path, read)
    with form.open_weights(tmp_path, read) as found, model.open_merged() as merged:
        for path, weight in weight_table(original).items():
            whole = (slice(None),) * len(weight.shape)
            # A norm is stored with one added.
            close = 2e-7 if weight.kind == "scale" else 0.0
            assert np.abs(found.read(path, whole) - merged.read(path, tuple(map(slice, weight.shape)))).max() <= close


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 2**-7.9)])
def test_each_type_rounds_as_far_as_its_format_says(tuned_models, tmp_path, kind, tolerance):
    model = tuned_models["gemma2"]
    written(model, tmp_path, kind)
    form = format_of("gguf")
    with form.open_weights(tmp_path, model.preset.architecture) as found, model.open_merged() as merged:
        for path, weight in weight_table(model.preset.architecture).items():
            expected = merged.read(path, tuple(map(slice, weight.shape)))
            error = np.abs(found.read(path, (slice(None),) * expected.ndim) - expected).max()
            assert error <= tolerance * np.abs(expected).max(), path
            assert error > 0 or weight.kind == "scale", path


def test_rows_that_blocks_of_32_do_not_divide_are_of_float16(devices, tmp_path):
    preset = tiny_presets.write_tiny_preset(tmp_path / "preset", "gemma", intermediate_dim=96)
    written(tuned(preset, tmp_path)[1], tmp_path / "out", "Q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in open_file(tmp_path / "out/model.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_vocabulary_gives_the_ids_of_the_preset_s_and_its_control_tokens(tuned_models, tmp_path, family):
    preset = tuned_models[family].preset
    path = written(tuned_models[family], tmp_path, chat_template="{{ bos_token }}")
    before = format_of("keras").load_tokenizer(preset.folder)
    after = format_of("gguf").load_tokenizer(tmp_path)
    assert after.vocabulary_size == before.vocabulary_size == 512
    assert [after.encode(text) for text in TEXTS] == [before.encode(text) for text in TEXTS]
    assert ControlTokens(after).as_tokens([SPELLED]) == ControlTokens(before).as_tokens([SPELLED])
    assert ControlTokens(after).as_text([SPELLED]) == ControlTokens(before).as_text([SPELLED])
    reader = open_file(path)
    types = field_of(reader, "tokenizer.ggml.token_type")
    ends = before.piece_id("<end_of_turn>")
    assert [types[number] for number in (0, 1, 2, 3, ends, before.piece_id("\n"))] == [3, 3, 3, 2, 3, 4]
    assert types[before.piece_id("<0x0A>")] == 6
    assert field_of(reader, "tokenizer.ggml.eot_token_id") == ends
    assert field_of(reader, "tokenizer.chat_template") == "{{ bos_token }}"


def test_the_vocabulary_of_gemma_4_is_written_as_pieces_and_pairs(tuned_models, tmp_path):
    preset = tuned_models["gemma4"].preset
    reader = open_file(written(tuned_models["gemma4"], tmp_path))
    before, after = (format_of("keras").load_tokenizer(preset.folder), format_of("gguf").load_tokenizer(tmp_path))
    assert [after.encode(text) for text in TEXTS] == [before.encode(text) for text in TEXTS]
    for spelled in (ControlTokens.as_tokens, ControlTokens.as_text):
        assert spelled(ControlTokens(after), [SPELLED_OF_GEMMA4]) == spelled(ControlTokens(before), [SPELLED_OF_GEMMA4])
    assert field_of(reader, "tokenizer.ggml.model") == "gemma4"
    types = field_of(reader, "tokenizer.ggml.token_type")
    found = {name: types[before.piece_id(name)] for name in ("<pad>", "<turn|>", "<|channel>", "\n\n", "\u2581\u2581")}
    assert found == {"<pad>": 3, "<turn|>": 3, "<|channel>": 4, "\n\n": 4, "\u2581\u2581": 1}


def test_a_router_stays_in_float32(tuned_models, tmp_path):
    reader = open_file(written(tuned_models["experts"], tmp_path, "F16"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["rope_freqs.weight"] == "F32"
    assert kinds["blk.0.ffn_gate_up_exps.weight"] == "F16"


def test_a_tokenizer_json_with_added_tokens_gives_the_same_ids_from_gguf(tuned_models, tmp_path):
    proto = base64.b64decode(json.loads(tokenizer_json.RECORDED.read_text())["proto"])
    content = tokenizer_json.tokenizer_json(proto, ("<|im_start|>", "<|im_end|>", "[TOOL]"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    before = format_of("safetensors").load_tokenizer(tmp_path)
    model = tuned_models["gemma"]
    config = {**model.preset.architecture.config, "vocabulary_size": 520}
    architecture = Architecture("GemmaBackbone", config)
    zeros = (
        (f"model.{weight.hugging_face}", np.zeros(weight.matrix_shape, "f4"))
        for weight in weight_table(architecture).values()
    )
    path = tmp_path / "m.gguf"
    write_gguf(path, architecture, zeros, model_of_json(content), "F16", name="tiny", terms=LICENSE)
    after = format_of("gguf").load_tokenizer(tmp_path)
    # Names of control tokens are marked as such, and a text that spells one stays text.
    marked = ("  ", "<start_of", "<|")
    texts = [text for text in [*tokenizer_json.TEXTS, *TEXTS, "a [TOOL] b"] if not any(each in text for each in marked)]
    assert [after.encode(text) for text in texts] == [before.encode(text) for text in texts]
    # The table has rows beyond the last of the added tokens.
    assert field_of(open_file(path), "tokenizer.ggml.tokens")[514:516] == ["[TOOL]", "[PAD0]"]


def test_writing_takes_the_memory_of_one_tensor(devices, tmp_path):
    config = {**tiny_presets.CONFIGS["gemma"], "hidden_dim": 1024, "intermediate_dim": 32768, "num_layers": 2}
    architecture = Architecture("GemmaBackbone", config)
    pieces = sentencepiece_model(open_tiny(tiny_presets.write_tiny_preset(tmp_path / "preset", "gemma")))
    made = (
        (f"model.{weight.hugging_face}", np.ones(weight.matrix_shape, np.float32))
        for weight in weight_table(architecture).values()
    )
    largest = 4 * 16384 * 1024
    tracemalloc.start()
    try:
        write_gguf(tmp_path / "m.gguf", architecture, made, pieces, "Q8_0", name="tiny", terms=LICENSE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Four threads with some temporaries of two megabytes.
    assert largest < peak < 2 * largest


def test_a_tensor_out_of_order_leaves_no_file(tuned_models, tmp_path):
    model = tuned_models["gemma"]
    pieces = sentencepiece_model(model.preset)
    with model.open_merged() as weights:
        tensors = list(hugging_face_tensors(weights))
    for wrong in (tensors[::-1], tensors[:-1], [*tensors, tensors[0]]):
        with pytest.raises(ValueError, match="expected"):
            write_gguf(tmp_path / "m.gguf", model.preset.architecture, wrong, pieces, "F32", name="tiny", terms=LICENSE)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_beyond_float16_is_refused_and_said(tuned_models, tmp_path):
    model = tuned_models["gemma"]
    with model.open_merged() as weights:
        tensors = [(name, values * np.float32(1e6)) for name, values in hugging_face_tensors(weights)]
    pieces = sentencepiece_model(model.preset)
    with pytest.raises(StageError, match=r"65504. Received: one beyond in token_embd.weight\nSet .* BF16"):
        write_gguf(tmp_path / "m.gguf", model.preset.architecture, tensors, pieces, "F16", name="tiny", terms=LICENSE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma2", {"query_head_dim_normalize": False, "num_query_heads": 2}, "query_head_dim_normalize=True"),
        ("gemma2", {"num_layers": 46, "num_query_heads": 2}, "46 blocks has query_head_dim_normalize=False"),
        ("gemma2", {"attention_logit_soft_cap": None}, "attention_logit_soft_cap=a number"),
        ("gemma3", {"final_logit_soft_cap": 30.0}, "final_logit_soft_cap=None"),
        ("gemma3", {"local_rope_scaling_factor": 2.0}, "local_rope_scaling_factor=1.0"),
        ("gemma", {"use_sliding_window_attention": True}, "use_sliding_window_attention=False"),
        ("gemma4", {"final_logit_soft_cap": None}, "final_logit_soft_cap=a number"),
        ("gemma4", {"global_rope_scaling_factor": 8.0}, "global_rope_scaling_factor=1.0"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(tmp_path, family, changes, said):
    class_name = tiny_presets.BACKBONES.get(family, "GemmaBackbone")
    architecture = Architecture(class_name, {**tiny_presets.CONFIGS[family], **changes})
    with pytest.raises(StageError, match=f"llama.cpp's {family} .*{said}. Received: "):
        write_gguf(tmp_path / "m.gguf", architecture, [], [], "F32", name="tiny", terms=LICENSE)


def test_a_gemma_4_that_shares_keys_of_other_blocks_than_llama_cpp_s_is_refused(tmp_path):
    # The last blocks with keys of their own are the other way round.
    names = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = {**tiny_presets.CONFIGS["gemma4"], **tiny_presets.EDGE["E4B"], "layer_types": names}
    architecture = Architecture("Gemma4Backbone", config)
    with pytest.raises(StageError, match=r"block 3 with those of block 1, in the model\nLeave gguf out"):
        write_gguf(tmp_path / "m.gguf", architecture, [], [], "F32", name="tiny", terms=LICENSE)


def test_an_adapter_has_one_rank_and_llama_cpp_s_names(tuned_models, tmp_path):
    model = tuned_models["gemma3"]
    modules = lora_modules(model)
    rank, tensors = common_rank(modules), dict(peft_tensors(model, modules))
    write_gguf_adapter(tmp_path / "lora.gguf", model.preset.architecture, tensors.items(), rank, name="tiny")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert field_of(reader, "general.type") == "adapter"
    assert field_of(reader, "general.architecture") == "gemma3"
    assert field_of(reader, "adapter.type") == "lora"
    assert field_of(reader, "adapter.lora.alpha") == rank
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(found) == 2 * 7 * 6
    expected = tensors["model.layers.5.mlp.down_proj.lora_B.weight"]
    assert np.array_equal(found["blk.5.ffn_down.weight.lora_b"], expected)
    tensors["model.layers.0.mlp.up_proj.lora_B.weight"] = np.ones((128, 1), np.float32)
    with pytest.raises(ValueError, match=rf"of one rank. Received: ranks=\[1, {rank}\]"):
        write_gguf_adapter(tmp_path / "no.gguf", model.preset.architecture, tensors.items(), rank, name="tiny")
    assert not (tmp_path / "no.gguf").exists()


def test_a_modelfile_names_the_file_and_stops_at_the_end_of_a_turn():
    gemma3 = Architecture("Gemma3Backbone", tiny_presets.CONFIGS["gemma3"])
    text = modelfile("model.gguf", LICENSE, gemma3)
    assert text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<end_of_turn>"\n' in text
    assert text.endswith(f'LICENSE """{LICENSE.name}: {LICENSE.url}"""\n')
    assert "ADAPTER" not in text
    gemma4 = Architecture("Gemma4Backbone", tiny_presets.CONFIGS["gemma4"])
    text = modelfile("model.gguf", LICENSE, gemma4)
    assert "<|turn>{{ .Role }}\n{{ .Content }}<turn|>\n" in text
    assert "<|turn>model\n<|channel>thought\n<channel|>{{ .Content }}" in text
    assert 'PARAMETER stop "<turn|>"\nPARAMETER stop "<|tool_response>"\n' in text
    assert "<start_of_turn>" not in (plain := modelfile("model.gguf", LICENSE, None))
    assert "<end_of_turn>" not in plain
