"""Products of few rows, joined products and the gated activation give what the plain computation gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from stages.core.model.gated import gated
from stages.core.model.products import FEW_ROWS, few_rows, few_rows_transposed, joined_products

pytestmark = pytest.mark.usefixtures("devices")


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_few_rows_give_the_plain_product(rows, stored):
    random = np.random.default_rng(rows)
    matrix = jnp.asarray(random.integers(-100, 100, (24, 16)), stored)
    x = jnp.asarray(random.normal(size=(rows, 16)), "bfloat16" if stored == "bfloat16" else "float32")
    wanted = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T
    found = jax.jit(few_rows_transposed)(x, matrix)
    assert found.shape == (rows, 24) and found.dtype == "float32"
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-2 if stored == "bfloat16" else 1e-3)
    if stored == "float32":
        np.testing.assert_allclose(jax.jit(few_rows)(x, matrix.T), wanted, rtol=1e-5, atol=1e-3)


def test_joined_products_of_heads_on_four_devices_are_the_plain_ones_in_value_and_gradient(devices):
    """Queries and keys of 8 and 4 heads, of hidden states that are gathered over time as a block gathers them."""
    random = np.random.default_rng(0)
    x, *kernels = (jnp.asarray(random.normal(size=shape), "float32") for shape in [(2, 8, 16), (8, 16, 4), (4, 16, 4)])
    weights = [jnp.asarray(random.normal(size=(2, 8, heads, 4)), "float32") for heads in (8, 4)]
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 4), ("batch", "model"))

    def local(x, kernels):
        return joined_products(jax.lax.all_gather(x, "model", axis=1, tiled=True), kernels)

    by_heads, by_time = P("batch", None, "model", None), P("batch", "model", None)
    on_devices = jax.shard_map(local, mesh=mesh, in_specs=(by_time, P("model")), out_specs=by_heads)

    def plain(x, kernels):
        return [jnp.einsum("bsd,kdh->bskh", x, kernel) for kernel in kernels]

    def total(multiplied):
        return lambda x: sum(jnp.sum(w * y) for w, y in zip(weights, multiplied(x, kernels), strict=True))

    for found, wanted in zip(jax.jit(on_devices)(x, kernels), plain(x, kernels), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    found, wanted = (jax.jit(jax.grad(total(each)))(x) for each in (on_devices, plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gated_activation_and_its_gradients_are_the_plain_ones(dtype):
    gate, up, weight = (jnp.asarray(each, dtype) for each in np.random.default_rng(1).normal(size=(3, 4, 32)))

    def plain(gate, up):
        return jax.nn.gelu(gate, approximate=True) * up

    def results(activation):
        value, way_back = jax.vjp(activation, gate, up)
        return value, *way_back(weight)

    for found, wanted in zip(results(gated), results(plain), strict=True):
        np.testing.assert_array_equal(found, wanted)
