"""Weights go from files to shards unaltered, without a random value or a second copy on the way."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from stages.core.common.errors import StageError
from stages.core.load import variants, weight_loading
from stages.core.load.backbone import build_backbone
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import format_of
from stages.core.presets.weight_table import weight_table
from tests.support.repository import FAMILIES
from tests.support.tiny_models import describe, load_tiny, open_tiny


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 4)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_the_files_and_lies_where_the_layout_says(presets, family, shape):
    import keras_hub

    wanted = keras_hub.models.Backbone.from_preset(str(presets[family]), dtype="float32")
    model = load_tiny(presets[family], shape)
    by_path = {placement.weight.path: placement for placement in model.placements}
    assert len(model.backbone.weights) == len(wanted.weights)
    for ours, theirs in zip(model.backbone.weights, wanted.weights, strict=True):
        assert ours.path == theirs.path
        np.testing.assert_array_equal(np.asarray(ours.value), np.asarray(theirs.value))
        placement = by_path[ours.path]
        assert ours.value.sharding.shard_shape(tuple(ours.shape)) == placement.shard_shape
        assert len(ours.value.addressable_shards) == shape[0] * shape[1]
        spec = tuple(ours.value.sharding.spec)
        assert spec + (None,) * (len(ours.shape) - len(spec)) == placement.spec


@pytest.mark.parametrize("family", FAMILIES)
def test_keras_itself_would_put_each_weight_there(presets, family):
    model = load_tiny(presets[family], (2, 4), rank=2)
    distribution = keras.distribution.distribution()
    for variable in model.backbone.weights:
        variable._layout, kept = None, variable._layout
        try:
            theirs = distribution.get_variable_layout(variable)
            assert tuple(theirs.axes) == (*kept.spec, *(None,) * (len(theirs.axes) - len(kept.spec))), variable.path
        finally:
            variable._layout = kept


def test_split_weight_files_are_read_as_one(presets, tmp_path):
    import keras_hub

    backbone = keras_hub.models.Backbone.from_preset(str(presets["gemma2"]), dtype="float32")
    split = tmp_path / "split"
    backbone.save_to_preset(str(split), max_shard_size=0.0002)
    for name in ("assets", "tokenizer.json", "preprocessor.json"):
        (split / name).exists() or (split / name).symlink_to(presets["gemma2"] / name)
    assert len(list(split.glob("*.weights.h5"))) > 1
    model = load_tiny(split, (1, 4))
    for ours, theirs in zip(model.backbone.weights, backbone.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(ours.value), np.asarray(theirs.value))


def test_bfloat16_holds_the_rounded_values_and_lora_stays_float32(presets):
    model = load_tiny(presets["gemma3"], (1, 8), rank=2, dtype="bfloat16")
    for variable in model.backbone.weights:
        assert str(variable.dtype) == ("float32" if "lora" in variable.path else "bfloat16")
        assert str(variable.value.dtype) == str(variable.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_preset_kept_in_bfloat16_as_the_public_ones_are_is_read_exactly(presets, tmp_path, dtype):
    import keras_hub

    rounded = keras_hub.models.Backbone.from_preset(str(presets["gemma2"]), dtype="bfloat16")
    folder = Path(shutil.copytree(presets["gemma2"], tmp_path / "p"))
    rounded.save_to_preset(str(folder))
    with h5py.File(folder / "model.weights.h5") as file:
        assert file["layers/reversible_embedding/vars/0"].dtype.itemsize == 2
    model = load_tiny(folder, (1, 4), dtype=dtype)
    for ours, theirs in zip(model.backbone.weights, rounded.weights, strict=True):
        assert str(ours.value.dtype) == dtype
        np.testing.assert_array_equal(
            np.asarray(ours.value).astype("f4"), np.asarray(theirs.value).astype("f4"), err_msg=ours.path
        )


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)], ids=str)
def test_no_weight_that_is_split_is_read_whole_and_no_slice_twice(presets, shape):
    preset = open_tiny(presets["gemma"])
    wide = Architecture("GemmaBackbone", {**preset.architecture.config, "vocabulary_size": 65536})
    model = variants.declare_model(describe(preset, shape), wide, None)
    most, asked = 0, []

    class Source:
        def read(self, path, index):
            nonlocal most
            asked.append((path, repr(index)))
            sizes = [len(range(*cut.indices(size))) for cut, size in zip(index, self.shape(path), strict=True)]
            values = np.zeros(sizes, "f4")
            most = max(most, values.nbytes)
            return values

        def shape(self, path):
            return next(tuple(each.shape) for each in model.backbone.weights if each.path == path)

    weight_loading.fill(model.backbone, model.placements, model.mesh, lambda path: Source())
    largest = max(model.placements, key=lambda each: each.weight.bytes)
    assert most == largest.bytes_per_device < largest.weight.bytes
    assert len(asked) == len(set(asked))
    split = sum(shape[1] if each.splits("model") else 1 for each in model.placements)
    assert len(asked) == split


def test_nothing_random_is_made_on_the_way(presets):
    backbone = build_backbone(open_tiny(presets["gemma"]).architecture, "float32")
    assert all(variable._value is None for variable in backbone.weights)
    with keras.StatelessScope():
        pass
    assert all(variable._value is None for variable in backbone.weights)


def damaged(folder: Path, target: Path, change) -> Path:
    """A copy of a preset whose weights file was changed."""
    shutil.copytree(folder, target)
    change(target / "model.weights.h5")
    return target


def test_a_truncated_weights_file_is_told(presets, tmp_path):
    folder = damaged(presets["gemma"], tmp_path / "p", lambda path: path.write_bytes(path.read_bytes()[:5000]))
    with pytest.raises(StageError, match="cannot be opened as HDF5"):
        load_tiny(folder, (1, 1))


def test_a_weight_that_is_missing_in_the_file_is_named(presets, tmp_path):
    def remove(path: Path) -> None:
        with h5py.File(path, "a") as file:
            del file["layers/reversible_embedding/vars/0"]

    with pytest.raises(StageError, match="none for token_embedding/embeddings"):
        load_tiny(damaged(presets["gemma"], tmp_path / "p", remove), (1, 1))


def test_a_weight_of_another_shape_is_named(presets, tmp_path):
    def replace(path: Path) -> None:
        with h5py.File(path, "a") as file:
            del file["layers/reversible_embedding/vars/0"]
            file["layers/reversible_embedding/vars/0"] = np.zeros((3, 64), "f4")

    with pytest.raises(StageError, match=r"token_embedding/embeddings \(512, 64\). Received: shape=\(3, 64\)"):
        load_tiny(damaged(presets["gemma"], tmp_path / "p", replace), (1, 1))


def test_more_devices_than_there_are_is_told(presets):
    with pytest.raises(StageError, match="needs 16 devices and this process has 8"):
        load_tiny(presets["gemma"], (2, 8))


def test_the_names_and_shapes_of_weights_in_a_file_are_those_that_keras_gives_them(presets):
    for family, folder in presets.items():
        stored = weight_table(format_of("keras").read_architecture(folder))
        with h5py.File(folder / "model.weights.h5") as file:
            found = {}
            file.visititems(lambda name, each, found=found: found.update({name: each}))
            found = {name: each.shape for name, each in found.items() if isinstance(each, h5py.Dataset)}
        assert {each.keras: each.shape for each in stored.values()} == found, family


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_at_load(presets, tmp_path, dtype, value):
    def spoil(path: Path) -> None:
        with h5py.File(path, "a") as file:
            file["layers/gemma_decoder_block_1/ffw_linear/vars/0"][3, 5] = value

    with pytest.raises(StageError, match=r"finite\. Received: .* decoder_block_1/ffw_linear/kernel"):
        load_tiny(damaged(presets["gemma"], tmp_path / "p", spoil), (1, 1), dtype=dtype)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool"])
def test_codes_never_become_weights(presets, dtype):
    model = load_tiny(presets["gemma"], (1, 1))
    codes = {each.weight.path: np.ones(each.weight.shape, dtype) for each in model.placements}
    source = weight_loading.ArraySource(codes)
    with pytest.raises(StageError, match=rf"plain floats, not quantized\. Received: .* of {dtype}"):
        weight_loading.fill(model.backbone, model.placements, model.mesh, lambda path: source)
