"""Codes are the weights to half a step, the same on every mesh, and nobody holds more floats than one weight's."""

from __future__ import annotations

import functools
import tracemalloc
from typing import get_args

import numpy as np
import pytest

from stages.core.common.errors import StageError
from stages.core.config.schema import Layout
from stages.core.config.section import IN_FULL_DTYPES, Dtype, Rule
from stages.core.load import quantizing, variants, weight_loading
from stages.core.presets.architecture import Architecture
from stages.core.records.forms import FORMS
from tests.support.repository import FAMILIES
from tests.support.tiny_models import describe, load_tiny, open_tiny

SUMMED = {"attention_output": (0, 1), "ffw_gating": (0,), "ffw_gating_2": (0,), "ffw_linear": (0,), "embeddings": (1,)}
"""The dimensions of a kernel that its product sums over, by the layer (of query, key and value the second)."""


def by_path(model) -> dict[str, np.ndarray]:
    return {variable.path: np.asarray(variable.value) for variable in model.backbone.weights}


@pytest.fixture(scope="module")
def on_one_device(presets):
    """By family and dtype the tiny model in codes, on one device."""
    return functools.cache(lambda family, dtype: by_path(load_tiny(presets[family], (1, 1), dtype=dtype)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_code_times_its_channels_scale_is_the_weight_to_half_a_step(presets, on_one_device, family):
    floats, found = by_path(load_tiny(presets[family], (1, 1))), on_one_device(family, "int8_table_float32")
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


@pytest.mark.parametrize("family", FAMILIES)
def test_of_4_bits_each_code_is_the_nearest_of_its_groups_sixteen(presets, on_one_device, family):
    floats, found = by_path(load_tiny(presets[family], (1, 1))), on_one_device(family, "int4_float32")
    in_four_bits = {path for path, values in found.items() if values.dtype == "int4"}
    assert {path.split("/")[-2] for path in in_four_bits} == {"query", "key", "ffw_gating", "ffw_gating_2"}
    for path in in_four_bits:
        weight, codes = (each[path].reshape(-1, 32, each[path].shape[-1]) for each in (floats, found))
        scale, offset = (found[f"{path}_{each}"] for each in ("scale", "offset"))
        assert scale.dtype == offset.dtype == "bfloat16"
        scale, offset = (each.astype("f4").reshape(-1, 1, each.shape[-1]) for each in (scale, offset))
        values = np.arange(-8, 8, dtype="f4")[:, None, None, None] * scale + offset
        errors, own = np.abs(values - weight), np.abs(codes.astype("f4") * scale + offset - weight)
        np.testing.assert_allclose(own, errors.min(axis=0), atol=1e-6)
        # What sixteen steps over the range of a group leave, on average a twelfth of a step squared.
        span = (weight.max(axis=1) - weight.min(axis=1)) / 15
        assert np.square(own).mean() < np.square(span).mean() / 12


@pytest.mark.parametrize("dtype", ["int8_table_float32", "int4_float32"])
@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_and_scales_are_the_same_on_every_mesh_and_lie_split_as_the_kernel(
    presets, on_one_device, family, shape, dtype
):
    model = load_tiny(presets[family], shape, dtype=dtype)
    variants.check_placed(model)
    for path, values in by_path(model).items():
        np.testing.assert_array_equal(values, on_one_device(family, dtype)[path], err_msg=path)
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


def test_groups_of_equal_numbers_and_of_two_far_apart_stay_what_they_are():
    values = np.zeros((32, 4), "f4")
    values[:, 1] = 0.5
    values[::2, 2], values[1::2, 2] = 1e30, -1e30
    values[0, 3] = 1e-45
    codes, scale, offset = (each.astype("f4") for each in quantizing.in_groups(values))
    found = codes * scale + offset
    np.testing.assert_array_equal(found[:, :2], values[:, :2])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 2], values[:, 2], rtol=0.05)


def test_a_group_whose_range_is_not_finite_is_refused():
    values = np.full((32, 1), 3e38, "f4")
    values[::2] *= -1
    with pytest.raises(StageError, match=r"finite range in each group\. Received: numbers up to 3e\+38"):
        quantizing.in_groups(values)


def test_pieces_of_a_weight_in_groups_are_coded_as_the_whole(monkeypatch):
    values = np.random.default_rng(0).normal(size=(3, 96, 5)).astype("f4")
    whole = quantizing.in_groups(values)
    monkeypatch.setattr(quantizing, "CACHED", 160)
    parts = [quantizing.in_groups(values[:, 32:64, 1:])]
    for one, other in zip(quantizing.in_groups(values), whole, strict=True):
        np.testing.assert_array_equal(one, other)
    for each in parts:
        np.testing.assert_array_equal(each[0], whole[0][:, 32:64, 1:])
        np.testing.assert_array_equal(each[1], whole[1][:, 1:2, 1:])


def test_a_rule_that_parts_a_group_is_refused(presets):
    rules = [Rule(pattern="decoder_block_.*/ffw_gating(_2)?/kernel", spec=["model", None])]
    layout = Layout(name="rules", rules=rules, shard_over_batch="none", max_replicated_fraction=1.0)
    load_tiny(presets["gemma"], (1, 2), layout=layout, dtype="int4_float32")
    with pytest.raises(StageError, match=r"size 2 must be divisible by the 4 devices.*ffw_gating/kernel_scale"):
        load_tiny(presets["gemma"], (1, 4), layout=layout, dtype="int4_float32")


def test_each_dtype_that_params_yaml_may_have_is_keras_own_or_a_form():
    assert set(get_args(Dtype)) == {*FORMS, *IN_FULL_DTYPES, "bfloat16"}
