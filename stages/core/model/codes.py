"""Values of codes of 4 bits, whose groups have a scale and an offset each: `load/quantizing.py` makes them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def values_of(codes: jax.Array, scale: jax.Array, offset: jax.Array, dtype: Any) -> jax.Array:
    """Return the values of a matrix, code scale + offset, computed in a dtype.

    Args:
        codes: int4 (..., inputs, outputs).
        scale: (..., groups, outputs), each of as many inputs.
        offset: the same.
        dtype: of the result.
    """
    return jax.lax.platform_dependent(
        codes, scale, offset, tpu=partial(spread_by_products, dtype=dtype), default=partial(spread_plainly, dtype=dtype)
    )


def spread_plainly(codes: jax.Array, scale: jax.Array, offset: jax.Array, dtype: Any) -> jax.Array:
    """Do what `values_of` does, with each scale and offset repeated for its group."""
    *outer, groups, outputs = scale.shape
    apart = codes.astype(dtype).reshape(*outer, groups, -1, outputs)
    scale, offset = (each.astype(dtype)[..., None, :] for each in (scale, offset))
    return (apart * scale + offset).reshape(codes.shape)


def spread_by_products(codes: jax.Array, scale: jax.Array, offset: jax.Array, dtype: Any) -> jax.Array:
    """Do what `values_of` does, with products that repeat each scale and offset, exactly: a row has a single one.

    A TPU's compiler repeats rows of bfloat16 at a seventh of the rate of its memory, into two arrays of the matrix's
    size. Products are faster and take codes and sums with them. The barriers keep both out of the product that takes
    the values, which would compute them again for each tile of its result.
    """
    inputs, groups = codes.shape[-2], scale.shape[-2]
    shape = (inputs, groups)
    group_of = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // (inputs // groups)
    ones = (group_of == jax.lax.broadcasted_iota(jnp.int32, shape, 1)).astype(scale.dtype)

    def spread(each: jax.Array) -> jax.Array:
        return jnp.einsum("ig,...go->...io", ones, each, preferred_element_type=dtype)

    scaled = jax.lax.optimization_barrier(codes.astype(dtype) * spread(scale))
    return jax.lax.optimization_barrier(scaled + spread(offset))
