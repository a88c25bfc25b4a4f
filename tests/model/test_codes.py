"""Values of codes of 4 bits are code scale + offset of their group, in the form for TPUs as well."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stages.core.model.codes import spread_by_products, spread_plainly

pytestmark = pytest.mark.usefixtures("devices")


@pytest.mark.parametrize("form", [spread_plainly, spread_by_products])
@pytest.mark.parametrize("outer", [(), (3,)], ids=["a matrix", "heads"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_value_is_its_code_times_the_groups_scale_and_its_offset(form, outer, dtype):
    random = np.random.default_rng(0)
    codes = jnp.asarray(random.integers(-8, 8, (*outer, 64, 16)), jnp.int4)
    scale, offset = (jnp.asarray(random.normal(size=(*outer, 2, 16)), "bfloat16") for _ in range(2))
    whole = [np.repeat(np.asarray(each, "float32"), 32, axis=-2) for each in (scale, offset)]
    wanted = np.asarray(codes, "float32") * whole[0] + whole[1]
    found = jax.jit(form, static_argnames="dtype")(codes, scale, offset, dtype=dtype)
    assert found.dtype == dtype
    # In bfloat16 the product and the sum are rounded, each to 8 bits.
    size = np.abs(wanted) + np.abs(whole[1])
    assert np.all(np.abs(np.asarray(found, "float32") - wanted) <= size * (2.0**-22 if dtype == "float32" else 2.0**-7))
