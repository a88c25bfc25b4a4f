"""Products of few rows, which read a matrix as it lies, are the plain ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stages.core.model.products import FEW_ROWS, few_rows, few_rows_transposed

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
