"""Codes chosen on training sequences: in every family, read back slice by slice, the same on every mesh."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import h5py
import numpy as np
import pytest

from stages.core.common.errors import StageError
from stages.core.common.paths import Paths
from stages.core.load import variants
from stages.core.load.chosen_codes import ChosenCodes, Codes, write_block
from stages.core.load.quantizing import in_groups
from stages.core.quantize.choosing import choose
from stages.core.records.quantize import QuantizedBase
from tests.support.tiny_models import describe, open_tiny, sequences
from tests.support.tiny_presets import EDGE, EXPERTS, write_tiny_preset
from tests.support.tuned_models import EVERY_KIND

DTYPE = "int4_float32"
MODELS = {**{name: (name, each) for name, each in EVERY_KIND.items()}, "E2B": ("gemma4", EDGE["E2B"])}


@pytest.fixture(scope="module")
def few() -> dict[str, np.ndarray]:
    """Eight sequences of 32 tokens, the last of which is padding in its second half."""
    found = sequences(8)
    segments = np.ones_like(found["token_ids"])
    segments[-1, 16:] = 0
    return {"token_ids": found["token_ids"], "segment_ids": segments}


def chosen_of(preset, given, root: Path):
    folder = root / "models/quantized"
    folder.mkdir(parents=True)
    index, errors = choose(preset, DTYPE, given, folder)
    index.write(folder / "index.json")
    return ChosenCodes(Paths(root, root), preset.fingerprint, DTYPE), errors


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_nearer_than_with_the_nearest_codes_in_every_family(name, few, devices, tmp_path):
    family, arguments = MODELS[name]
    preset = open_tiny(write_tiny_preset(tmp_path / "preset", family, **arguments))
    chosen, errors = chosen_of(preset, few, tmp_path)
    shared = sum(kind.keys_of is not None for kind in preset.architecture.kinds)
    assert len(errors) == 4 * preset.architecture.config["num_layers"] - shared
    assert all(path in chosen for path in errors)
    # Few tokens, which a random model's inputs have less in common in than those of a trained one.
    chosen_error, nearest_error = np.mean([(each.chosen, each.nearest) for each in errors.values()], axis=0)
    assert chosen_error < 0.8 * nearest_error


def test_a_base_has_the_same_chosen_codes_on_every_mesh(few, devices, tmp_path):
    preset = open_tiny(write_tiny_preset(tmp_path / "preset", "gemma2"))
    chosen, errors = chosen_of(preset, few, tmp_path)
    values = []
    for shape in ((1, 1), (2, 4)):
        model = variants.declare_model(describe(preset, shape, dtype=DTYPE), preset.architecture, None)
        variants.fill_model(model, preset, {}, chosen=chosen)
        values.append({each.path: np.asarray(each.value) for each in model.backbone.weights})
    assert values[0].keys() == values[1].keys()
    for path, one in values[0].items():
        np.testing.assert_array_equal(one, values[1][path], err_msg=path)
    for path in errors:
        everything = (slice(None),) * values[0][path].ndim
        for end, written in zip(("", "_scale", "_offset"), chosen.read(path, everything), strict=True):
            np.testing.assert_array_equal(values[0][f"{path}{end}"], written)


def test_padding_chooses_nothing(few, devices, tmp_path):
    preset = open_tiny(write_tiny_preset(tmp_path / "preset", "gemma3"))
    filled = {**few, "token_ids": few["token_ids"].copy()}
    filled["token_ids"][-1, 16:] = 7
    one, other = (chosen_of(preset, each, tmp_path / name)[0] for name, each in (("a", few), ("b", filled)))
    assert one.fingerprint == other.fingerprint is not None


def test_experts_are_rounded_to_the_nearest_and_dense_layers_chosen(few, devices, tmp_path):
    preset = open_tiny(write_tiny_preset(tmp_path / "preset", "gemma4", **EXPERTS))
    chosen, errors = chosen_of(preset, few, tmp_path)
    assert "decoder_block_0/ffw_gating/kernel" in errors
    assert not any("moe" in path for path in errors)
    assert "decoder_block_0/moe_expert_bank/gate_proj" not in chosen
    config = describe(preset, (1, 1), dtype=DTYPE)
    model = variants.declare_model(config, preset.architecture, None)
    variants.fill_model(model, preset, {}, chosen=chosen)


def test_a_damaged_model_is_told_and_not_rounded(few, devices, tmp_path):
    preset = open_tiny(write_tiny_preset(tmp_path / "preset", "gemma"))
    with h5py.File(tmp_path / "preset/model.weights.h5", "r+") as file:
        file["layers/gemma_decoder_block/pre_attention_norm/vars/0"][0] = np.nan
    with pytest.raises(
        StageError, match=r"Activations must be finite .* Received: a NaN or an infinity in decoder_block_0\nThe check"
    ):
        choose(preset, DTYPE, few, tmp_path)


def test_any_slice_of_a_file_is_that_of_the_whole(tmp_path):
    codes = Codes(*in_groups(np.random.default_rng(1).standard_normal((3, 64, 10)).astype(np.float32)))
    (tmp_path / "models/quantized").mkdir(parents=True)
    digest = write_block(tmp_path / "models/quantized/decoder_block_0.safetensors", {"decoder_block_0/a/kernel": codes})
    (tmp_path / "models/quantized/index.json").write_text(
        QuantizedBase(
            base="x", dtype=DTYPE, files={"decoder_block_0.safetensors": digest}, kernels=("decoder_block_0/a/kernel",)
        ).model_dump_json()
    )
    found = ChosenCodes(Paths(tmp_path, tmp_path), "x", DTYPE)
    pieces = (
        (slice(None), slice(1, 3)),
        (slice(None), slice(32, 64)),
        (slice(None), slice(0, 3), slice(3, 8), slice(5, 6)),
    )
    for index in product(*pieces):
        heads, inputs, outputs = index
        groups = slice((inputs.start or 0) // 32, (inputs.stop or 64) // 32)
        part = found.read("decoder_block_0/a/kernel", index)
        np.testing.assert_array_equal(part.codes, codes.codes[index])
        assert part.codes.dtype == codes.codes.dtype and part.scale.dtype == codes.scale.dtype
        np.testing.assert_array_equal(part.scale, codes.scale[heads, groups, outputs])
        np.testing.assert_array_equal(part.offset, codes.offset[heads, groups, outputs])
    with pytest.raises(ValueError, match="even last dimension"):
        write_block(tmp_path / "odd.safetensors", {"a": Codes(*(each[..., :3] for each in codes))})


def test_codes_of_another_base_or_a_lost_file_are_refused(few, devices, tmp_path):
    preset = open_tiny(write_tiny_preset(tmp_path / "preset", "gemma"))
    chosen, errors = chosen_of(preset, few, tmp_path)
    with pytest.raises(
        StageError, match=r"must have been made from this base, other in int4. Received: .* Run `dvc repro"
    ):
        ChosenCodes(Paths(tmp_path, tmp_path), "other", "int4")
    config = describe(preset, (1, 1), dtype=DTYPE)
    with pytest.raises(StageError, match="Received: other codes"):
        variants.codes_of(Paths(tmp_path, tmp_path), config)
    same = config.model_copy(update={"codes": chosen.fingerprint})
    assert variants.codes_of(Paths(tmp_path, tmp_path), same).fingerprint == chosen.fingerprint
    (tmp_path / "models/quantized/decoder_block_0.safetensors").unlink()
    with pytest.raises(StageError, match="must hold decoder_block_0/"):
        chosen.read(next(iter(errors)), (slice(None),) * 3)
