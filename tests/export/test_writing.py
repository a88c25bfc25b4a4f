"""What export writes, by our own readers: it is the tuned model, and a mistake in it is found."""

from __future__ import annotations

import functools
import json
import shutil
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from stages.core.common.errors import ParamsError, StageError
from stages.core.export import exporting, keras_preset, proof, safetensors_file, verifying
from stages.core.export import tuned as tuned_module
from stages.core.export.adapter import lora_modules, peft_tensors
from stages.core.export.formats import left_out
from stages.core.export.hugging_face_config import config_of, write_config
from stages.core.export.names import is_instruct, public_name
from stages.core.export.peft import adapter_config, target_modules, vllm_rank
from stages.core.export.tensors import hugging_face_shapes, hugging_face_tensors
from stages.core.export.vocabulary import tokenizer_json
from stages.core.fetch.catalog import GEMMAS, architecture
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import format_of
from stages.core.presets.hf_config import read_architecture
from stages.core.presets.json_vocabulary import model_of_json
from stages.core.presets.manifest import LICENSE
from stages.core.presets.tokenizer import Tokenizer
from stages.core.records.manifest import Manifest
from tests.support.repository import FAMILIES
from tests.support.tiny_models import keras_hub_reads
from tests.support.tiny_presets import CONFIGS, tiny_proto, tiny_reviews

KINDS = [(family, kind) for family in FAMILIES for kind in ("lora", "full")]


def as_matrix(source, path: str, weight) -> np.ndarray:
    return tuned_module.as_matrix(weight, functools.partial(source.read, path))


def manifest(preset: str, source: str = "kaggle") -> Manifest:
    return Manifest(preset=preset, source=source, format="keras", handle=None, folder="x", license=LICENSE, files=())


@pytest.mark.parametrize("case", KINDS, ids="-".join)
def test_the_block_by_block_pass_computes_the_pipeline_s_logits(cases, case):
    found = cases[case]
    with exporting.reference(found.job()) as compared:
        logits = compared.reading.logits(slice(0, 512))
    assert len(compared.ids) > 8 + proof.BEYOND and logits.shape == (proof.COMPARED, 512)
    np.testing.assert_allclose(logits, found.logits[-proof.COMPARED :], atol=2e-4)


@pytest.mark.parametrize("case", KINDS, ids="-".join)
def test_every_format_is_written_and_read_back_within_its_tolerance(cases, case, tmp_path, facts):
    found = cases[case]
    job = found.job("peft", "huggingface", "keras", "gguf")
    with exporting.reference(job) as compared:
        measured = exporting.export(compared, tmp_path, facts)
    assert set(measured) == {"huggingface", "keras", "gguf"} | ({"peft"} if found.tuned.lora.rank else set())
    for name, each in measured.items():
        assert each.logit_difference <= 3e-4 and each.same_choice_fraction == 1.0
        assert each.bytes == sum(file.stat().st_size for file in (tmp_path / name).rglob("*") if file.is_file())
    assert np.abs(found.logits - found.base).max() > 1


def test_the_same_model_gives_the_same_bytes_and_what_was_there_goes(cases, tmp_path, facts):
    job = cases["gemma3", "lora"].job("peft", "huggingface", "keras")
    with exporting.reference(job) as compared:
        exporting.export(compared, tmp_path / "one", facts)
        (tmp_path / "two" / "keras").mkdir(parents=True)
        (tmp_path / "two" / "keras" / "left.txt").touch()
        exporting.export(compared, tmp_path / "two", facts)
    files = {file.relative_to(tmp_path / "one"): file for file in (tmp_path / "one").rglob("*") if file.is_file()}
    again = {file.relative_to(tmp_path / "two"): file for file in (tmp_path / "two").rglob("*") if file.is_file()}
    assert files.keys() == again.keys()
    # HDF5 notes times nowhere either.
    assert {name for name in files if files[name].read_bytes() != again[name].read_bytes()} == set()


@pytest.mark.parametrize(("dtype", "gguf_type"), [("float32", "F16"), ("bfloat16", "BF16")])
def test_rounded_weights_are_those_of_the_tuned_model_rounded(cases, tmp_path, facts, dtype, gguf_type):
    job = cases["gemma2", "lora"].job("huggingface", "keras", "gguf", dtype=dtype, gguf_type=gguf_type)
    with exporting.reference(job) as compared:
        measured = exporting.export(compared, tmp_path, facts)
        effects = [proof.difference(compared.reading, compared.of(name), 512).largest for name in measured]
    # The rounding itself changes more than the tolerance.
    assert [effect > 1e-3 for effect in effects] == [dtype == "bfloat16"] * 2 + [True]
    assert all(each.logit_difference <= 3e-4 for each in measured.values())
    with safe_open(tmp_path / "huggingface" / "model.safetensors", framework="np") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"F32" if dtype == "float32" else "BF16"}
    assert json.loads((tmp_path / "huggingface" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("name", ["peft", "huggingface"])
def test_a_single_wrong_matrix_is_found(cases, tmp_path, facts, name):
    job = cases["gemma3", "lora"].job(name)
    with exporting.reference(job) as compared:
        exporting.export(compared, tmp_path, facts)
        path = next((tmp_path / name).glob("*.safetensors"))
        tensors = load_file(path)
        wrong = next(each for each in tensors if "layers.4.mlp.gate_proj" in each)
        save_file({**tensors, wrong: tensors[wrong] * np.float32(1.01)}, path)
        with pytest.raises(StageError, match=r"logits within 0.001 .* Received: a difference of"):
            exporting.check(name, tmp_path / name, compared)


def test_other_tokens_are_found(cases, tmp_path, facts):
    job = cases["gemma", "lora"].job("huggingface")
    with exporting.reference(job) as compared:
        exporting.export(compared, tmp_path, facts)
        path = tmp_path / "huggingface" / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["merges"].reverse()
        path.write_text(json.dumps(content))
        with pytest.raises(StageError, match="must split a text into the tuned model's tokens"):
            exporting.check("huggingface", tmp_path / "huggingface", compared)


def test_a_nan_is_no_small_difference():
    with pytest.raises(StageError, match="nan"):
        exporting.check_difference("it", proof.Difference(float("nan"), 1.0, 1.0), 1e-3)


def test_weights_are_made_in_pieces_of_any_size(cases, monkeypatch):
    model = cases["gemma2", "lora"].tuned
    with model.open_merged() as weights:
        whole = list(hugging_face_tensors(weights))
        # Less than one step of any first axis: each step is a piece of its own.
        monkeypatch.setattr(tuned_module.pieces, "__defaults__", (1,))
        parts = list(hugging_face_tensors(weights))
    assert [name for name, _ in parts] == list(hugging_face_shapes(model.preset.architecture))
    for (name, one), (_, other) in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, err_msg=name)


def test_writing_holds_one_weight_and_not_the_model(cases, tmp_path):
    model = cases["gemma3", "lora"].tuned
    with model.open_merged() as weights:
        shapes = hugging_face_shapes(model.preset.architecture)
        largest, total = (f(4 * np.prod(shape) for shape in shapes.values()) for f in (max, sum))
        tracemalloc.start()
        safetensors_file.write_model(
            tmp_path, shapes, np.dtype("f4"), hugging_face_tensors(weights), largest=int(largest)
        )
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 3 * largest + 200_000 < total
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"] == {"total_size": total} and index["weight_map"].keys() == shapes.keys()
    write_config(tmp_path, model.preset.architecture, "float32")
    shutil.copy(model.preset.folder / "assets/tokenizer/vocabulary.spm", tmp_path / "tokenizer.model")
    format_of("safetensors").check_weights(tmp_path, model.preset.architecture)


# --- The adapter. ---


@pytest.mark.parametrize("family", FAMILIES)
def test_all_modules_of_an_adapter_have_one_rank_and_the_scale_is_in_b(cases, family):
    model = cases[family, "lora"].tuned
    modules = lora_modules(model)
    heads = model.preset.architecture.config["num_query_heads"]
    assert {module.rank for module in modules} >= {3 * heads, 3}
    found = dict(peft_tensors(model, modules))
    assert {name: each.shape[0 if "lora_A" in name else 1] for name, each in found.items()} == dict.fromkeys(
        found, 3 * heads
    )
    config = adapter_config(modules, model.preset.architecture, "text", "google/x")
    # As vLLM and llama.cpp take it: one scale for all modules.
    scale = config["lora_alpha"] / config["r"]
    with model.open_merged() as merged, model.open_base() as base:
        for path, weight in merged.table.items():
            name = f"model.{weight.hugging_face.removesuffix('.weight')}"
            if f"{name}.lora_A.weight" not in found:
                continue
            before, after = (as_matrix(source, path, weight) for source in (base, merged))
            change = scale * found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"]
            np.testing.assert_allclose(after - before, change, atol=2e-6)


def test_target_modules_name_layers_or_each_module_where_some_blocks_have_none(cases):
    modules = lora_modules(cases["gemma3", "lora"].tuned)
    assert target_modules(modules, 6, "text") == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    some = [each for each in modules if "layers.4" not in each.name or "q_proj" not in each.name]
    assert "layers.3.self_attn.q_proj" in target_modules(some, 6, "text")
    assert not any("layers.4.self_attn.q_proj" in each for each in target_modules(some, 6, "text"))
    assert target_modules(modules, 6, "vision")[0] == "language_model.layers.0.self_attn.q_proj"


def test_the_names_for_a_vision_base_are_written_and_read_back(cases, tmp_path, facts):
    job = cases["gemma3", "lora"].job("peft", base="vision")
    with exporting.reference(job) as compared:
        measured = exporting.export(compared, tmp_path, facts)
    assert measured["peft"].logit_difference <= 3e-4
    names = set(load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    with pytest.raises(ParamsError, match=r"export\.base must be text unless .* Received: export\.base=vision"):
        cases["gemma2", "lora"].job(base="vision")


def test_vllm_needs_the_next_rank_that_it_allows():
    assert [vllm_rank(rank) for rank in (1, 2, 16, 17, 64, 512, 513)] == [1, 8, 16, 32, 64, 512, None]


def test_with_every_weight_trained_there_is_no_adapter(cases, tmp_path, facts, logged):
    job = cases["gemma", "full"].job("peft")
    assert left_out(job).keys() == {"peft"}
    with exporting.reference(job) as compared:
        assert exporting.export(compared, tmp_path, facts) == {}
    assert any("peft is left out: every weight was trained" in line for line in logged())


# --- Configurations, names, vocabularies. ---


@pytest.mark.parametrize("preset", GEMMAS)
def test_the_configuration_of_every_public_gemma_says_what_its_architecture_says(preset, tmp_path):
    wanted = architecture(preset)
    write_config(tmp_path, wanted, "bfloat16")
    found = read_architecture(tmp_path)
    assert found.class_name == wanted.class_name
    # Which blocks have windows is said by their names.
    given = {key: value for key, value in wanted.config.items() if key != "sliding_window_pattern"}
    assert {key: found.config[key] for key in given} == given and found.kinds == wanted.kinds
    config = config_of(wanted, "bfloat16")
    if not preset.startswith(("gemma_", "gemma4", "vault")):
        assert config["query_pre_attn_scalar"] == {"gemma2_27b_en": 144, "gemma3_27b_text": 168}.get(preset, 256)
    # What readers before transformers 5 take instead of rope_parameters and layer_types.
    assert config["torch_dtype"] == "bfloat16"
    if preset.startswith("gemma3"):
        large = preset not in ("gemma3_270m", "gemma3_1b")
        assert config["rope_scaling"] == ({"rope_type": "linear", "factor": 8.0} if large else None)
        assert (config["rope_theta"], config["rope_local_base_freq"], config["sliding_window_pattern"]) == (1e6, 1e4, 6)
        assert config["max_position_embeddings"] == (131072 if large else 32768)


@pytest.mark.parametrize(
    "change",
    [
        {"use_query_key_norm": False},
        {"local_rope_scaling_factor": 2.0},
        {"use_post_ffw_norm": False},
        {"use_sliding_window_attention": False},
    ],
)
def test_what_transformers_gemma_cannot_express_is_refused(change, tmp_path):
    (key,) = change
    with pytest.raises(StageError, match=rf"Received: {key}="):
        write_config(tmp_path, Architecture("Gemma3Backbone", {**CONFIGS["gemma3"], **change}), "float32")


@pytest.mark.parametrize(
    ("preset", "name", "instruct"),
    [
        ("gemma_2b_en", "google/gemma-2b", False),
        ("gemma_1.1_instruct_7b_en", "google/gemma-1.1-7b-it", True),
        ("code_gemma_1.1_instruct_7b_en", "google/codegemma-1.1-7b-it", True),
        ("gemma2_27b_en", "google/gemma-2-27b", False),
        ("shieldgemma_9b_en", "google/shieldgemma-9b", False),
        ("gemma3_270m", "google/gemma-3-270m", False),
        ("gemma3_1b", "google/gemma-3-1b-pt", False),
        ("gemma3_instruct_4b_text", "google/gemma-3-4b-it", True),
        ("kaggle://keras/gemma3/keras/gemma3_instruct_270m/4", "google/gemma-3-270m-it", True),
        ("hf://somebody/gemma-italian@abc", "somebody/gemma-italian", False),
        ("hf://google/gemma-2-2b-it", "google/gemma-2-2b-it", True),
    ],
)
def test_a_preset_has_a_name_at_hugging_face(preset, name, instruct):
    assert (public_name(manifest(preset)), is_instruct(manifest(preset))) == (name, instruct)


def test_a_label_of_the_user_s_own_is_kept_and_says_nothing():
    own = manifest("gemma3_instruct_1b", "path")
    assert (public_name(own), is_instruct(own)) == ("gemma3_instruct_1b", False)


def test_a_vocabulary_goes_to_tokenizer_json_and_back_with_the_same_ids():
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tiny_proto())
    again = model_of_json(tokenizer_json(model))
    one, other = (Tokenizer.from_proto(each.SerializeToString()) for each in (model, again))
    texts = [*tiny_reviews(8), proof.TEXT, " " * 70, "\N{LOWER ONE EIGHTH BLOCK}" * 9 + "x"]
    assert one.encode_all(texts) == other.encode_all(texts)


# --- The card, and --verify where a library is missing. ---


def test_the_card_has_base_terms_data_settings_figures_samples_use_and_limits(cases, tmp_path, facts):
    job = cases["gemma3", "lora"].job("peft")
    with exporting.reference(job) as compared:
        exporting.export(compared, tmp_path, facts)
    card = (tmp_path / "peft" / "README.md").read_text()
    head = ["---", 'base_model: "preset"', "license: gemma", "library_name: peft", "pipeline_tag: text-generation"]
    assert card.splitlines()[:5] == head
    for wanted in (
        *("Gemma Terms of Use", "160 texts to train on, 40 held out", "| `rank` | `3` |", "| `alpha` | `6.0` |"),
        *("| perplexity | 31.15 | 28.94 |", "-0.0733", "--max-lora-rank 16", "Gemma3ForCausalLM"),
    ):
        assert wanted in card, wanted
    # The sample has a fence of four and an escape of a terminal.
    assert "`````text\n````\\x1b[31m<script>\n`````" in card and "\x1b" not in card


def test_a_library_that_is_not_installed_is_told_in_a_line(cases, tmp_path, facts, monkeypatch):
    job = cases["gemma", "lora"].job("peft")
    monkeypatch.setitem(verifying.LIBRARIES, "peft", (("no_such_package",), None))
    with exporting.reference(job) as compared:
        with pytest.raises(StageError, match="models/export/peft must be there to be verified"):
            list(verifying.verify(compared, tmp_path))
        exporting.export(compared, tmp_path, facts)
        (line,) = verifying.verify(compared, tmp_path)
    assert line == "peft: not verified, no_such_package is not installed (requirements-readers.txt has it)."


@pytest.mark.parametrize("case", KINDS, ids="-".join)
def test_keras_hub_reads_the_preset_and_computes_the_same(cases, case, tmp_path):
    found = cases[case]
    with found.tuned.open_merged() as weights:
        keras_preset.write_preset(tmp_path, found.tuned.preset, weights, "float32")
    _, logits = keras_hub_reads(tmp_path)(np.array([found.ids], np.int32))
    assert np.abs(np.asarray(logits)[0] - found.logits).max() < 1e-3


@pytest.mark.parametrize("family", ["gemma", "gemma3", "gemma4"])
def test_keras_hub_makes_a_task_of_the_preset_with_its_tokenizer(cases, family, tmp_path):
    import keras_hub

    model = cases[family, "lora"].tuned
    with model.open_merged() as weights:
        keras_preset.write_preset(tmp_path, model.preset, weights, "float32")
    # By the class that the card names: of Gemma 4's two keras-hub's CausalLM takes the assistant's.
    task = getattr(keras_hub.models, f"{family.capitalize()}CausalLM").from_preset(str(tmp_path), load_weights=False)
    own = format_of("keras").load_tokenizer(model.preset.folder)
    for text in [*tiny_reviews(4), proof.TEXT.partition("<bos>")[0]]:
        assert list(task.preprocessor.tokenizer(text)) == own.encode(text)


def test_keras_hub_reads_bfloat16(cases, tmp_path):
    import keras_hub

    model = cases["gemma3", "lora"].tuned
    with model.open_merged() as weights:
        keras_preset.write_preset(tmp_path, model.preset, weights, "bfloat16")
        wanted = {
            path: weights.read(path, tuple(slice(0, n) for n in each.shape)) for path, each in weights.table.items()
        }
    backbone = keras_hub.models.Backbone.from_preset(str(tmp_path), dtype="bfloat16")
    for variable in backbone.weights:
        np.testing.assert_allclose(np.asarray(variable.value, "f4"), wanted[variable.path], rtol=2**-8)
