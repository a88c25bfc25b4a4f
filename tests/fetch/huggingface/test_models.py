"""A repository that is no preset is refused before its weights are downloaded."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from stages.core.common.errors import ParamsError
from stages.core.fetch.hub import source_of
from stages.core.fetch.hub_files import needed_files
from stages.core.fetch.huggingface import _license
from stages.core.presets.hf_config import MODEL_TYPES
from stages.core.records.manifest import License
from tests.support.hf_folder import config_of, hugging_face_files
from tests.support.hub_files import KERAS, PLAIN, PRESET, REPO, SPLIT_PLAIN, WEIGHTS
from tests.support.tiny_presets import CONFIGS


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"model_type": "llama"}, "model_type=llama"),
        ({"class_name": "LlamaBackbone", "config": {}}, "backbone=LlamaBackbone"),
        ({"class_name": "Gemma3Backbone", "config": {"vision_encoder": {}}}, "a Gemma with a vision encoder"),
        (config_of("gemma3", CONFIGS["gemma3"]) | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ([], "config.json must be a JSON object"),
    ],
    ids=["another family", "another backbone", "vision", "embedding", "no configuration"],
)
def test_another_model_is_refused_before_its_weights_are_downloaded(hub, fetch, config, reason):
    hub.files["config.json"] = json.dumps(config).encode()
    run = fetch()
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if not line.startswith("Downloading")]
    assert lines[0].startswith(f"Invalid setting: {REPO} is not a text Gemma that this project runs. Received: ")
    assert reason in lines[0]
    assert lines[1].startswith("Choose a text model of Gemma 1, 2 or 3")
    assert hub.downloaded == ["config.json"]


def changed_tensors(change, files=1):
    """The files of a plain checkpoint whose tensors are other ones."""
    content = hugging_face_files(files)
    for name in [name for name in content if name.endswith(".safetensors")]:
        content[name] = save(change(load(content[name])))
    return content


def renamed(name):
    return lambda tensors: {name(key): value for key, value in tensors.items()}


UP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj"
UNUSABLE = {
    "an unknown tensor": (
        changed_tensors(lambda tensors: tensors | {"score.weight": np.zeros((2, 64), "f4")}),
        "Received: score.weight in model.safetensors",
    ),
    "another shape": (
        changed_tensors(lambda tensors: tensors | {UP: np.zeros((64, 64), "f4")}),
        f"The tensor {UP} (for decoder_block_1/ffw_gating_2/kernel) must have the shape (128, 64) that config.json",
    ),
    "a tensor that is missing": (
        changed_tensors(lambda tensors: {key: value for key, value in tensors.items() if key != UP}),
        f"The weight files must hold {UP}",
    ),
    "codes": (
        changed_tensors(lambda tensors: tensors | {UP: np.zeros((128, 64), "i1")}),
        f"must be plain floats (F64, F32, F16, BF16), not quantized. Received: {UP} of I8",
    ),
    "an adapter": (
        changed_tensors(lambda tensors: tensors | {f"{QUERY}.lora_A.weight": np.zeros((4, 64), "f4")}),
        f"of a LoRA adapter that was not merged. Received: {QUERY}.lora_A.weight",
    ),
    "a wrapper": (
        changed_tensors(renamed(lambda name: f"module.{name}")),
        "Received: module.model.embed_tokens.weight, module.model.layers.0.input_layernorm.weight, ",
    ),
    "a tensor in two files": (
        changed_tensors(lambda tensors: tensors | {UP: np.zeros((128, 64), "f4")}, files=2),
        f"Each tensor must lie in one file. Received: {UP} in model-00002-of-00002.safetensors and in model-00001-of",
    ),
    "a missing shard": (
        {name: content for name, content in SPLIT_PLAIN.items() if name != "model-00002-of-00002.safetensors"},
        "must hold every file that model.safetensors.index.json names. Missing: model-00002-of-00002.safetensors",
    ),
    "an end that is missing": (PLAIN | {"model.safetensors": WEIGHTS[:-8]}, "bytes that its header states. Received: "),
    "no header": (
        PLAIN | {"model.safetensors": b"PK\x03\x04" + WEIGHTS},
        "must begin with the length of a safetensors",
    ),
    "another vocabulary": (
        changed_tensors(lambda tensors: tensors | {"model.embed_tokens.weight": np.zeros((1000, 64), "f4")})
        | {"config.json": json.dumps(config_of("gemma3", CONFIGS["gemma3"]) | {"vocab_size": 1000}).encode()},
        "as many pieces as its table has rows, or up to 255 fewer. Received: 512 pieces, 1,000 rows in google/gemma-ti",
    ),
}


@pytest.mark.parametrize(
    ("flaw", "how"),
    [*((flaw, "fetch") for flaw in UNUSABLE), ("another shape", "check"), ("a missing shard", "check")],
)
def test_what_could_not_be_used_is_refused_before_its_weights_are_downloaded(hub, fetch, ask, flaw, how):
    hub.files, reason = UNUSABLE[flaw]
    if how == "check":
        said = ask("check_huggingface")
    else:
        run = fetch()
        assert run.returncode == 2
        said = run.stderr.partition("Invalid setting: ")[2]
    assert said.startswith(REPO)
    assert reason in said
    assert 1 <= len(said.splitlines()) <= 2
    assert {name for name in hub.downloaded if name.endswith(".safetensors")} == set()


def test_a_preset_of_keras_hubs_with_another_vocabulary_is_refused_before_its_weights_are_downloaded(hub, fetch):
    config = json.loads(KERAS["config.json"])
    config["config"]["vocabulary_size"] = 1000
    hub.files = KERAS | {"config.json": json.dumps(config).encode()}
    run = fetch()
    assert run.returncode == 2
    assert "The vocabulary must be that of the model" in run.stderr
    assert "model.weights.h5" not in hub.downloaded


def test_a_hub_that_knows_no_ranges_sends_no_more_than_the_header_that_is_read(hub, ask):
    hub.knows_ranges = False
    hub.files = hugging_face_files(padding=300_000)
    assert ask("check_huggingface")["trouble"] is None
    # A header that is longer than what is read at first is asked for once more.
    assert hub.beginnings == ["model.safetensors"] * 2


def test_what_the_hub_knows_of_the_model_is_enough_to_refuse_it(hub, fetch):
    hub.information["config"] = {"model_type": "paligemma"}
    run = fetch()
    assert run.returncode == 2
    assert run.stderr.startswith(f"Invalid setting: {REPO} is not a text Gemma ({', '.join(MODEL_TYPES)}).")
    assert hub.downloaded == []


def test_a_repository_without_weights_or_vocabulary_is_refused(hub, fetch):
    del hub.files["tokenizer.model"]
    run = fetch()
    assert run.returncode == 2
    assert "tokenizer.model, the SentencePiece vocabulary" in run.stderr
    del hub.files["model.safetensors"], hub.files["pytorch_model.bin"]
    run = fetch()
    assert run.returncode == 2
    assert "must hold config.json with model.weights.h5 (keras-hub) or model.safetensors" in run.stderr


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "a PEFT adapter without its model"),
        ({"model-Q4_K_M.gguf": b""}, r"a GGUF file \(model-Q4_K_M\.gguf\)"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, r"weights as a pickle \(pytorch_model\.bin\)"),
    ],
    ids=["adapter", "gguf", "pickle"],
)
def test_a_repository_of_something_else_is_said_to_be_what_it_is(files, what):
    from huggingface_hub.hf_api import ModelInfo

    info = ModelInfo(id=REPO, siblings=[{"rfilename": name} for name in files])
    with pytest.raises(ParamsError, match=rf"{REPO} must be a preset\. Received: {what}\n"):
        needed_files(source_of(PRESET), info)


@pytest.mark.parametrize(
    "card, license",
    [
        ({"license": "gemma"}, {"name": "Gemma Terms of Use", "url": "https://ai.google.dev/gemma/terms"}),
        (
            {
                "license": "other",
                "license_name": "health-ai-developer-foundations",
                "license_link": "https://developers.google.com/health-ai-developer-foundations/terms",
            },
            {
                "name": "Health AI Developer Foundations Terms of Use",
                "url": "https://developers.google.com/health-ai-developer-foundations/terms",
            },
        ),
        ({"license": "cc-by-4.0"}, {"name": "cc-by-4.0", "url": f"https://huggingface.co/{REPO}"}),
        (
            {"license": "other", "license_name": "mine", "license_link": "https://example.org/mine"},
            {"name": "mine", "url": "https://example.org/mine"},
        ),
        ({}, {"name": "terms on the model's page", "url": f"https://huggingface.co/{REPO}"}),
    ],
)
def test_the_license_is_the_one_that_the_models_card_states(hub, card, license):
    from huggingface_hub.hf_api import ModelInfo

    assert _license(source_of(PRESET), ModelInfo(id=REPO, cardData=card)) == License(**license)


def test_a_vision_model_of_keras_hubs_is_refused_by_its_name_alone():
    with pytest.raises(ParamsError, match=r"gemma3_4b has a vision tower(?s:.*)Its text preset is gemma3_4b_text"):
        source_of("hf://keras/gemma3_4b")


@pytest.mark.parametrize("preset", ["gemma3_1b", "hf://gemma", "hf://a/b/c", "hf://../b", "hf://a/b@", "hf://a--b/c"])
def test_a_handle_that_is_none_is_a_wrong_setting(preset):
    with pytest.raises(ParamsError, match=r"must be hf://owner/model or hf://owner/model@revision"):
        source_of(preset)
