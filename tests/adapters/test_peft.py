"""Adapters in PEFT's form: ours come back as they were, as kernels and as a variant; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stages.core.adapters.adapted import load_adapted, open_variant
from stages.core.adapters.bases import check_base
from stages.core.adapters.peft import read_peft
from stages.core.adapters.peft_weights import AdaptedSource, keras_kernels
from stages.core.common.errors import ParamsError, StageError
from stages.core.common.paths import Paths
from stages.core.export.adapter import common_rank, lora_modules, peft_tensors
from stages.core.load import adapter
from stages.core.records.manifest import License, Manifest
from tests.support.repository import FAMILIES
from tests.support.tiny_models import describe, load_tiny, open_tiny
from tests.support.tuned_models import ALL_LAYERS, logits, tuned

pytestmark = pytest.mark.usefixtures("devices")

IDS = [2, *np.random.default_rng(1).integers(4, 512, 30).tolist()]


def write_peft(folder: Path, tensors: dict[str, np.ndarray], **config) -> Path:
    """An adapter's folder."""
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": values for name, values in tensors.items()}, folder / "adapter_model.safetensors"
    )
    plain = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "bias": "none", "base_model_name_or_path": "someone/tiny"}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    return folder


def query_only(blocks: int = 2, rank: int = 3, inputs: int = 64) -> dict[str, np.ndarray]:
    """Matrices of the queries of the first blocks of a tiny Gemma."""
    random = np.random.default_rng(0)
    return {
        f"model.layers.{number}.self_attn.q_proj.lora_{matrix}.weight": random.normal(size=shape).astype("f4")
        for number in range(blocks)
        for matrix, shape in (("A", (rank, inputs)), ("B", (64, rank)))
    }


def manifest(preset: str, source: str = "kaggle") -> Manifest:
    """A manifest with nothing but a name."""
    terms = License("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")
    return Manifest(preset=preset, source=source, format="keras", handle=None, folder="x", license=terms, files=())


@pytest.fixture(scope="module")
def ours(presets, tmp_path_factory):
    """Of each family a tuned model, and its adapter as export writes it."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        _, model = tuned(presets[family], folder)
        modules = lora_modules(model)
        rank = common_rank(modules)
        targets = sorted({module.name.rpartition(".")[2] for module in modules})
        config = {"r": rank, "lora_alpha": rank, "target_modules": targets}
        made[family] = model, write_peft(folder / "peft", dict(peft_tensors(model, modules)), **config)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_our_adapter_comes_back_as_the_kernels_it_was_made_from(ours, family):
    model, folder = ours[family]
    kernels = keras_kernels(read_peft(folder, model.preset.architecture, "tiny"), 3, model.lora.scale)
    assert sorted(kernels) == sorted(model.trained)
    for path, values in kernels.items():
        # The scale, which B has in the file, is a power of two.
        assert np.array_equal(values, model.trained.array(path)), path


@pytest.mark.parametrize("family", FAMILIES)
def test_any_slice_of_a_weight_has_the_adapter_in_it(ours, family):
    model, folder = ours[family]
    found = read_peft(folder, model.preset.architecture, "tiny")
    with model.open_base() as base, model.open_merged() as merged:
        source = AdaptedSource(base, found)
        for path in (path for path in merged.table if path.startswith("decoder_block_1")):
            shape = source.shape(path)
            whole = merged.read(path, tuple(slice(0, size) for size in shape))
            for axis in range(len(shape)):
                cut = tuple(
                    slice(1, size - 1) if at == axis and size > 3 else slice(0, size) for at, size in enumerate(shape)
                )
                assert np.allclose(source.read(path, cut), whole[cut], rtol=0, atol=1e-6), (path, cut)


@pytest.mark.parametrize("form", ["ours", "peft's"])
def test_a_variant_of_our_adapter_is_the_tuned_model_in_either_form(ours, tmp_path, form):
    model, folder = ours["gemma2"]
    if form == "ours":
        folder = tmp_path
        said = {"base": model.preset.fingerprint, "preset": "tiny", **model.config.tuned.model_dump()}
        adapter.save(folder / "adapter.safetensors", {path: model.trained.array(path) for path in model.trained}, said)
    describe(model.preset, (1, 2)).write(tmp_path / "models/baseline/model.json")
    found = logits(load_adapted(Paths(tmp_path, tmp_path), folder, model.preset), IDS)
    expected = logits(load_tiny(model.preset.folder, (1, 2), rank=3, targets=ALL_LAYERS), IDS)
    assert np.abs(found - expected).max() < 1e-4


def test_a_folder_without_an_adapter_is_no_variant(ours, tmp_path):
    model, _ = ours["gemma2"]
    said = r"variants\.mine must name a folder with adapter_config.json and .* Received: variants\.mine=nowhere"
    with pytest.raises(ParamsError, match=said):
        open_variant(Paths(tmp_path, tmp_path), "mine", {"mine": "nowhere"}, model.preset)


@pytest.mark.parametrize(
    "named", ["google/gemma-3-270m-it", "unsloth/gemma-3-1b-pt", "google/gemma-2-2b", "gemma-270m"]
)
def test_an_adapter_of_another_gemma_is_refused_by_the_name_of_its_base(named):
    with pytest.raises(StageError, match=f"put on, gemma3_270m. Received: base_model_name_or_path={named} in mine\n"):
        check_base(named, manifest("gemma3_270m"), Path("mine"))


@pytest.mark.parametrize(
    ("preset", "named"),
    [
        ("gemma3_270m", "google/gemma-3-270m"),
        ("gemma3_instruct_1b", "unsloth/gemma-3-1b-it-unsloth-bnb-4bit"),
        ("kaggle://keras/gemma/keras/gemma_1.1_instruct_2b_en/4", "google/gemma-1.1-2b-it"),
        ("hf://google/gemma-3-1b-pt@main", "/models/Gemma-3-1B"),
        ("code_gemma_2b_en", "google/codegemma-2b"),
        ("gemma3_270m", "/data/base"),
        ("gemma3_270m", None),
    ],
)
def test_the_same_gemma_by_another_name_and_a_base_without_one_are_taken(preset, named):
    check_base(named, manifest(preset), Path("mine"))


def test_of_a_local_preset_the_label_says_nothing():
    check_base("google/gemma-2-2b", manifest("gemma3_270m", source="path"), Path("mine"))


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({}, {"target_modules": ["q_proj"], "r": 4}, r"lora_A .* must be \(4, 64\): of rank 4 .* Received: \(3, 64\)"),
        (
            {"blocks": 3},
            {"target_modules": ["q_proj"]},
            r"which has 2 blocks. Received: model.layers.2.self_attn.q_proj",
        ),
        (
            {"inputs": 640},
            {"target_modules": ["q_proj"]},
            r"64 inputs in tiny. Received: \(3, 640\) \(made for someone/tiny",
        ),
        ({}, {"target_modules": ["q_proj", "v_proj"]}, "lacks model.layers.0.self_attn.v_proj, model.layers.1"),
        ({}, {"target_modules": ["v_proj"]}, r"also has model.layers.0.self_attn.q_proj|lacks"),
        ({}, {"target_modules": ["q_proj"], "layers_to_transform": [0]}, "also has model.layers.1.self_attn.q_proj"),
        ({}, {"target_modules": ["q_proj"], "use_dora": True}, "use_dora=False. Received: use_dora=True"),
        ({}, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "Received: init_lora_weights='pissa'"),
        ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({}, {"target_modules": ["q_proj"], "peft_type": "IA3"}, "peft_type=LORA. Received: peft_type='IA3'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_difference(presets, tmp_path, tensors, config, said):
    folder = write_peft(tmp_path / "peft", query_only(**tensors), **config)
    with pytest.raises(StageError, match=said) as caught:
        read_peft(folder, open_tiny(presets["gemma"]).architecture, "tiny")
    assert str(caught.value).count("\n") <= 1


def test_an_adapter_without_its_other_half_or_its_file_is_refused(presets, tmp_path):
    architecture = open_tiny(presets["gemma"]).architecture
    folder = write_peft(tmp_path / "peft", query_only(), target_modules=["q_proj"])
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)
    with pytest.raises(
        StageError, match=r"lora_A and lora_B of model\.layers\.\d\.self_attn\.q_proj\. Received: lora_"
    ):
        read_peft(folder, architecture, "tiny")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StageError, match="complete safetensors file"):
        read_peft(folder, architecture, "tiny")
    path.unlink()
    with pytest.raises(StageError, match="no such file"):
        read_peft(folder, architecture, "tiny")


def test_one_whose_heads_do_not_share_b_cannot_be_keras_kernels(presets, tmp_path):
    folder = write_peft(tmp_path / "peft", query_only(), target_modules=["q_proj"])
    found = read_peft(folder, open_tiny(presets["gemma"]).architecture, "tiny")
    with pytest.raises(StageError, match=r"4 equal blocks of rank 3 on the diagonal .* Received: rank 3"):
        keras_kernels(found, 3, 1.0)


def test_another_rank_than_the_kernels_is_refused(ours):
    model, folder = ours["gemma"]
    found = read_peft(folder, model.preset.architecture, "tiny")
    for rank in (2, 4):
        with pytest.raises(StageError, match="Set finetune"):
            keras_kernels(found, rank, 1.0)
