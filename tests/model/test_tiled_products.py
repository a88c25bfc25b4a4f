"""Products of experts tile by tile, which GPUs run, against the masked ones, which the CPU runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stages.core.model import tiled_products
from stages.core.model.tiled_products import TILE

INPUTS, OUTPUTS = 24, 40
CLOSE = 1e-6
"""Of the largest number: sums of float32 in another order. Measured 3e-7."""
SENT = {
    "to all alike": [TILE, TILE, TILE, TILE],
    "no row to some": [0, 2 * TILE + 5, 0, 3],
    "one row over a tile": [TILE + 1, TILE - 1, 1, TILE],
    "all to the last": [0, 0, 0, 300],
    "none": [0, 0, 0, 0],
}


def given(sizes: list[int], more: int, dtype=np.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, of which the last are of no expert; matrices; and rows of each expert."""
    random = np.random.default_rng(0)
    x = random.standard_normal((sum(sizes) + more, INPUTS), np.float32)
    w = random.standard_normal((len(sizes), INPUTS, OUTPUTS), np.float32)
    w = np.round(50 * w).clip(-127, 127) if dtype == np.int8 else w
    return jnp.asarray(x), jnp.asarray(w.astype(dtype)), jnp.asarray(sizes, jnp.int32)


def assert_close(found: jax.Array, wanted: jax.Array) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert np.abs(found - wanted).max(initial=0) <= CLOSE * np.abs(wanted).max(initial=0)


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
@pytest.mark.parametrize("more", [0, 70])
@pytest.mark.parametrize("sizes", SENT.values(), ids=SENT)
def test_products_are_those_of_the_masked_form(sizes, more, dtype):
    x, w, sent = given(sizes, more, dtype)
    mine = slice(sum(sizes))
    wanted = jax.lax.ragged_dot(x, w.astype(jnp.float32), sent)
    assert_close(tiled_products.times(x, w, sent, None)[mine], wanted[mine])
    turned = jnp.swapaxes(w, 1, 2)
    assert_close(tiled_products.times(x, turned, sent, None, transposed=True)[mine], wanted[mine])


@pytest.mark.parametrize("more", [0, 70])
@pytest.mark.parametrize("sizes", SENT.values(), ids=SENT)
def test_gradients_of_matrices_are_those_of_the_masked_form(sizes, more):
    x, w, sent = given(sizes, more)
    y = jnp.sin(x @ w[0])
    _, transpose = jax.vjp(lambda w: jax.lax.ragged_dot(x, w, sent), w)
    (wanted,) = transpose(y)
    assert_close(tiled_products.gradient_of_matrices(x, y, sent, None, jnp.float32), wanted)


def test_rows_of_no_expert_may_hold_anything():
    x, w, sent = given([3, 5], 4)
    wanted = tiled_products.gradient_of_matrices(x, x @ w[0], sent, None, jnp.float32)
    spoilt = x.at[8:].set(jnp.nan)
    found = tiled_products.gradient_of_matrices(spoilt, spoilt @ w[0], sent, None, jnp.float32)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(
        tiled_products.times(spoilt, w, sent, None)[:8], tiled_products.times(x, w, sent, None)[:8]
    )
