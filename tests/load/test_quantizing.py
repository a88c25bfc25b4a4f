"""Int8 codes are the weights to half a step, the same on every mesh, and nobody holds more floats than one weight's."""

from __future__ import annotations

import functools
import tracemalloc
from typing import get_args

import numpy as np
import pytest

from stages.core.config.section import QUANTIZED, Dtype
from stages.core.load import quantizing, variants, weight_loading
from stages.core.presets.architecture import Architecture
from tests.support.repository import FAMILIES
from tests.support.tiny_models import describe, load_tiny, open_tiny

SUMMED = {"attention_output": (0, 1), "ffw_gating": (0,), "ffw_gating_2": (0,), "ffw_linear": (0,), "embeddings": (1,)}
"""The dimensions of a kernel that its product sums over, by the layer (of query, key and value the second)."""


def by_path(model) -> dict[str, np.ndarray]:
    return {variable.path: np.asarray(variable.value) for variable in model.backbone.weights}


@pytest.fixture(scope="module")
def on_one_device(presets):
    """By family the tiny model with all that can be in codes, on one device."""
    return functools.cache(lambda family: by_path(load_tiny(presets[family], (1, 1), dtype="int8_table_float32")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_code_times_its_channels_scale_is_the_weight_to_half_a_step(presets, on_one_device, family):
    floats, found = by_path(load_tiny(presets[family], (1, 1))), on_one_device(family)
    assert {path for path in found if not path.endswith("_scale")} == set(floats)
    for path, weight in floats.items():
        layer, name = path.split("/")[-2:]
        if name not in ("kernel", "embeddings"):
            np.testing.assert_array_equal(found[path], weight)
            continue
        codes, scale = found[path], found[f"{path}_scale"]
        assert codes.dtype == np.int8 and scale.dtype == np.float32
        axes = SUMMED.get("embeddings" if name == "embeddings" else layer, (1,))
        np.testing.assert_array_equal(scale, np.abs(weight).max(axis=axes, keepdims=True) / np.float32(127))
        assert np.abs(codes.astype("f4") * scale - weight).max() <= scale.max() * 0.5001
        assert (np.abs(codes).max(axis=axes) == 127).all()


@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_and_scales_are_the_same_on_every_mesh_and_lie_split_as_the_kernel(presets, on_one_device, family, shape):
    model = load_tiny(presets[family], shape, dtype="int8_table_float32")
    variants.check_placed(model)
    for path, values in by_path(model).items():
        np.testing.assert_array_equal(values, on_one_device(family)[path], err_msg=path)
    placed = {each.weight.path: each for each in model.placements}
    for each in model.placements:
        if of := each.weight.scale_of:
            pairs = zip(each.weight.shape, placed[of].spec, strict=True)
            assert each.spec == tuple(None if size == 1 else axis for size, axis in pairs)


@pytest.mark.parametrize(("dtype", "rest"), [("int8", "bfloat16"), ("int8_float32", "float32")])
def test_without_the_table_only_the_blocks_matrices_are_codes(presets, dtype, rest):
    model = load_tiny(presets["gemma3"], (1, 4), rank=2, dtype=dtype)
    for variable in model.backbone.weights:
        kind = "int8" if variable.path.endswith("/kernel") else rest
        if "lora" in variable.path or variable.path.endswith("kernel_scale"):
            kind = "float32"
        assert str(variable.value.dtype) == str(variable.dtype) == kind, variable.path
    assert {each.path.split("/")[-1] for each in model.backbone.trainable_variables} == {
        "lora_kernel_a",
        "lora_kernel_b",
    }


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)], ids=str)
def test_floats_are_read_once_and_of_a_split_table_no_more_than_a_part_is_held(presets, shape):
    preset = open_tiny(presets["gemma"])
    wide = Architecture("GemmaBackbone", {**preset.architecture.config, "vocabulary_size": 65536})
    model = variants.declare_model(describe(preset, shape, dtype="int8_table"), wide, None)
    shapes = {variable.path: tuple(variable.shape) for variable in model.backbone.weights}
    asked = []

    class Source:
        def read(self, path, index):
            asked.append((path, repr(index)))
            sizes = [len(range(*cut.indices(size))) for cut, size in zip(index, shapes[path], strict=True)]
            return np.ones(sizes, "f4")

        def shape(self, path):
            return shapes[path]

    tracemalloc.start()
    try:
        weight_loading.fill(model.backbone, model.placements, model.mesh, lambda path: Source())
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(asked) == len(set(asked))
    split = sum(shape[1] if each.splits("model") else 1 for each in model.placements if not each.weight.scale_of)
    assert len(asked) == split
    table = next(each for each in model.placements if each.weight.path == "token_embedding/embeddings")
    # A part as floats, its codes, and what is divided and rounded at a time; Keras' and JAX' own are small.
    assert most < 3.5 * 4 * table.bytes_per_device + (2 << 20)


def test_a_channel_of_zeros_stays_zeros_and_the_smallest_numbers_do_not_overflow():
    values = np.zeros((3, 4), "f4")
    values[1] = [1e-45, -1e-45, 0, 0]
    values[2] = [3e38, -3e38, 1e38, 0]
    scales = quantizing.scales_of(quantizing.largest(values, (3, 1)))
    codes = quantizing.codes(values, scales)
    np.testing.assert_array_equal(codes[0], 0)
    np.testing.assert_array_equal(codes[2], [127, -127, 42, 0])
    assert np.isfinite(codes * scales).all()


def test_pieces_of_a_weight_are_coded_as_the_whole(monkeypatch):
    values = np.random.default_rng(0).normal(size=(7, 5, 3)).astype("f4")
    for shape in ((7, 1, 3), (1, 1, 3)):
        scales = quantizing.scales_of(quantizing.largest(values, shape))
        whole = quantizing.codes(values, scales)
        monkeypatch.setattr(quantizing, "PIECE", 30)
        np.testing.assert_array_equal(quantizing.codes(values, scales), whole)


def test_each_dtype_that_params_yaml_may_have_is_keras_own_or_a_form():
    assert {name for name in get_args(Dtype) if name.startswith(QUANTIZED)} == set(quantizing.FORMS)
