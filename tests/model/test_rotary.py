"""Rotations are keras-hub's own, and their way back is their transpose."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stages.core.model import rotary as rotations
from stages.core.model.rotary import Rotary
from stages.core.presets.architecture import Architecture
from tests.support.tiny_presets import CONFIGS

HEAD = 16


@pytest.fixture
def queries(devices) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 8, 3, HEAD)).astype("f4")


def kind_of(layer, turned=HEAD // 2):
    """The kind of a block with a layer of keras-hub's."""
    any_kind = Architecture("GemmaBackbone", {**CONFIGS["gemma"], "head_dim": HEAD}).kinds[0]
    return dataclasses.replace(
        any_kind, wavelength=float(layer.max_wavelength), rope_scaling=float(layer.scaling_factor), turned=turned
    )


def rotary(layers, positions):
    turn = Rotary([kind_of(layer) for layer in layers], positions)
    return lambda layer, x: turn(kind_of(layer), x)


@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_each_layer_turns_by_its_own_wavelength_and_scaling_as_in_keras_hub(queries, scaling):
    from keras_hub.layers import RotaryEmbedding

    layers = [RotaryEmbedding(10_000.0), RotaryEmbedding(1_000_000.0, scaling_factor=scaling)]
    turn = rotary(layers, np.arange(8, dtype=np.int32)[None, :])
    results = [np.asarray(turn(layer, queries)) for layer in layers]
    for layer, result in zip(layers, results, strict=True):
        np.testing.assert_allclose(result, layer(queries), atol=2e-6)
    assert np.abs(results[0] - results[1]).max() > 0.1


def test_a_row_with_positions_of_its_own_is_turned_by_them(queries):
    from keras_hub.layers import RotaryEmbedding

    layer = RotaryEmbedding()
    positions = np.arange(8, dtype=np.int32)
    shifted = np.stack([positions, positions + 5])
    result = np.asarray(rotary([layer], shifted)(layer, queries))
    for row in (0, 1):
        np.testing.assert_allclose(result[row], layer(queries[row : row + 1], positions=shifted[row])[0], atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_way_back_is_the_rotations_transpose(queries, seed):
    from keras_hub.layers import RotaryEmbedding

    layer = RotaryEmbedding()
    turn = rotary([layer], np.arange(8, dtype=np.int32)[None, :])
    towards = np.random.default_rng(seed).normal(size=queries.shape).astype("f4")
    turned, pull = jax.vjp(lambda x: turn(layer, x), queries)
    (back,) = pull(towards)
    np.testing.assert_allclose(np.vdot(turned, towards), np.vdot(queries, back), atol=1e-3)
    assert np.abs(np.asarray(back) - towards).max() > 0.1


def test_queries_are_turned_by_the_same_bits_however_it_is_written(queries):
    """The default run's weights follow from them."""
    angles = np.random.default_rng(1).uniform(0, 6, (1, 8, 1, HEAD // 2)).astype("f4")
    cos, sin = np.cos(angles), np.sin(angles)

    def turned(x, cos, sin):
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)

    def back(x, cos, sin):
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate((first * cos + second * sin, second * cos - first * sin), axis=-1)

    found, of_found = jax.jit(
        lambda x, g: (lambda y, pull: (y, pull(g)[0]))(*jax.vjp(lambda x: rotations._rotate(x, cos, sin), x))
    )(queries, queries + 1)
    np.testing.assert_array_equal(found, jax.jit(turned)(queries, cos, sin))
    np.testing.assert_array_equal(of_found, jax.jit(back)(queries + 1, cos, sin))


def test_a_tpus_product_swaps_the_halves_exactly(queries):
    x = jnp.asarray(queries, jnp.bfloat16)
    one, none = (jnp.full((1, 8, 1, HEAD // 2), value, x.dtype) for value in (1, 0))
    np.testing.assert_array_equal(rotations._by_product(x, none, one), rotations._by_halves(x, none, one))
    cos, sin = (one * value for value in (0.8, 0.6))
    by_product, by_halves = (
        np.asarray(turn(x, cos, sin), np.float32) for turn in (rotations._by_product, rotations._by_halves)
    )
    # Each sum of two products is rounded to 8 bits, or each of the three is.
    np.testing.assert_allclose(by_product, by_halves, atol=2.0**-8 * 2 * np.abs(queries).max())
