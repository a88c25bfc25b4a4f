"""Adapters: where they start, and what they are applied to."""

from __future__ import annotations

import jax.numpy as jnp
import keras
import numpy as np
import pytest

from stages.core.load import lora_kernels
from stages.core.model import lora
from tests.support.repository import FAMILIES
from tests.support.tiny_models import load_tiny


def test_b_starts_at_zero_and_a_within_keras_own_bounds(devices):
    shape = (4, 640, 4)
    a = lora_kernels.first_value("decoder_block_0/attention/query/lora_kernel_a", shape, 0)
    keras_a = np.asarray(keras.initializers.HeUniform(seed=0)(shape))
    assert np.abs(a).max() == pytest.approx(np.abs(keras_a).max(), rel=0.01)
    assert a.std() == pytest.approx(keras_a.std(), rel=0.05)
    assert not lora_kernels.first_value("decoder_block_0/attention/query/lora_kernel_b", (4, 256), 0).any()


def test_each_layer_and_each_seed_has_a_start_of_its_own():
    starts = [
        lora_kernels.first_value(f"decoder_block_{block}/attention/query/lora_kernel_a", (2, 8, 2), seed).tobytes()
        for block in (0, 1)
        for seed in (0, 1)
    ]
    assert len(set(starts)) == 4
    again = lora_kernels.first_value("decoder_block_1/attention/query/lora_kernel_a", (2, 8, 2), 1).tobytes()
    assert again == starts[3]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_targets_get_an_adapter_and_all_else_is_frozen(presets, family):
    model = load_tiny(presets[family], (1, 1), rank=3, targets=("key", "ffw_linear"))
    trainable = {variable.path for variable in model.backbone.trainable_variables}
    wanted = {
        f"decoder_block_{block}/{layer}/lora_kernel_{kernel}"
        for block in (0, 1)
        for layer in ("attention/key", "ffw_linear")
        for kernel in "ab"
    }
    assert trainable == wanted


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("targets", [("query",), ("key",), ("attention_output",), ("ffw_gating",), ("ffw_linear",)])
def test_an_adapter_applied_is_the_adapter_merged(presets, targets, divided):
    model = load_tiny(presets["gemma2"], (1, 1), rank=2, targets=targets)
    layer = lora_kernels.target_layers(model.backbone, targets)[0]
    dimensions = {"btd": (2, 3, 64), "bsd": (2, 3, 64), "btnh": (2, 3, 4, 16), "btf": (2, 3, 64)}
    x = np.random.default_rng(0).normal(size=dimensions[layer.equation.split(",")[0]]).astype("f4")
    # `layer.kernel` is Keras' own W + (alpha / rank) A B.
    merged = jnp.einsum(layer.equation, x, layer.kernel)
    np.testing.assert_allclose(lora.project(layer, x, divided=divided), merged, rtol=1e-4, atol=1e-4)
