"""A model of codes is the float model of the numbers that the codes stand for: losses, gradients, text."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from stages.core.finetune import trainer
from stages.core.generate.sampling import Sampler, SamplerSettings
from stages.core.model import lora
from stages.core.model.causal_lm import make_model
from stages.core.records.layout import LoraConfig
from tests.support.codes import numbers_of
from tests.support.repository import FAMILIES
from tests.support.tiny_models import load_tiny, sequences
from tests.support.tiny_runs import data, settings

LAYERS = ("attention/.*", "ffw_.*")
FORMS = ("int8_table_float32", "int4_float32")
PROMPTS = [[2, 10, 11, 12], [2, 40], [2, *range(100, 113)]]


@pytest.fixture(scope="module")
def pair(presets):
    """A model of codes on a mesh, and the float model of the same numbers on one device, with the same adapter."""

    @functools.cache
    def both(family: str, shape: tuple[int, int], dtype: str):
        ours = load_tiny(presets[family], shape, rank=3, targets=LAYERS, dtype=dtype)
        return ours, numbers_of(ours, presets[family], LoraConfig(3, 6.0, LAYERS))

    return both


def loss_and_gradients(model, batch, *, rematerialize=False):
    """The loss of a batch, and its gradient in every trained weight."""
    causal = make_model(model.backbone, model.jax_mesh, model.placements, rematerialize=rematerialize)
    trained = causal.trainable_variables
    state = [each.value for each in causal.non_trainable_variables]

    def loss(values):
        found, _ = causal.stateless_call(values, state, batch, training=True)
        return (found["loss"] * batch["weights"]).sum() / batch["weights"].sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))([each.value for each in trained])
    return float(value), {each.path: np.asarray(g) for each, g in zip(trained, gradients, strict=True)}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 1), "int8_float32"), ((2, 4), "int8_table_float32"), ((1, 1), "int4_float32"), ((2, 4), "int4_float32")],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_numbers_that_the_codes_stand_for(pair, family, shape, dtype):
    ours, floats = pair(family, shape, dtype)
    batch = sequences(4)
    (one, found), (other, wanted) = loss_and_gradients(ours, batch), loss_and_gradients(floats, batch)
    assert one == pytest.approx(other, rel=1e-5)
    assert found.keys() == wanted.keys()
    # A block of Gemma 4 that sees everything has its keys for values.
    assert len(found) == 2 * (2 * 7 - (family == "gemma4"))
    for path, gradient in wanted.items():
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(found[path], gradient, atol=1e-4 * largest, rtol=1e-3, err_msg=path)


@pytest.mark.parametrize("dtype", FORMS)
def test_rematerialized_the_gradients_are_the_same(pair, dtype):
    ours, _ = pair("gemma3", (2, 4), dtype)
    batch = sequences(4)
    (one, found), (other, again) = (loss_and_gradients(ours, batch, rematerialize=each) for each in (False, True))
    assert one == pytest.approx(other, rel=1e-6)
    for path, gradient in found.items():
        np.testing.assert_allclose(again[path], gradient, atol=1e-5 * np.abs(gradient).max(), rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 4)], ids=str)
def test_text_is_that_of_the_float_model_with_the_adapter_and_without(pair, shape, dtype):
    ours, floats = pair("gemma3", shape, dtype)
    wanted = SamplerSettings(10, (511,))

    def continued(model, values=None):
        return Sampler(make_model(model.backbone, model.jax_mesh, model.placements))(PROMPTS, wanted, values=values)

    base = lora.values_of_base(ours.backbone)
    lora.set_aside(ours.backbone, keep_base=True)()
    assert continued(ours) == continued(floats)
    of_base = lora.values_of_base(floats.backbone)
    plain = [
        np.zeros_like(value) if "lora_kernel_b" in each.path else value
        for each, value in zip(floats.backbone.variables, of_base, strict=True)
    ]
    assert continued(ours, base) == continued(floats, plain) != continued(ours)


@pytest.mark.parametrize("dtype", ["int8_table", "int4"])
def test_a_run_learns_and_changes_no_code(presets, dtype):
    model = load_tiny(presets["gemma2"], (2, 4), rank=2, targets=LAYERS, dtype=dtype, random_b=False)
    before = {each.path: np.asarray(each.value) for each in model.backbone.weights}
    result = trainer.fit(model, data(), settings(epochs=3, targets=list(LAYERS), rematerialize=True))
    assert result.history.rows[-1].loss < result.history.rows[0].loss
    for each in model.backbone.weights:
        assert np.array_equal(np.asarray(each.value), before[each.path]) == ("lora" not in each.path), each.path
    floats = load_tiny(presets["gemma2"], (1, 1), rank=2, targets=LAYERS)
    assert result.total_parameters == sum(each.weight.parameters for each in floats.placements)
