"""Values of codes of 4 bits, whose groups have a scale and an offset each: `load/quantizing.py` makes them."""

from __future__ import annotations

from typing import Any

import jax


def values_of(codes: jax.Array, scale: jax.Array, offset: jax.Array, dtype: Any) -> jax.Array:
    """Return the values of a matrix, code scale + offset, computed in a dtype.

    Args:
        codes: int4 (..., inputs, outputs).
        scale: (..., groups, outputs), each of as many inputs.
        offset: the same.
        dtype: of the result.
    """
    *outer, groups, outputs = scale.shape
    apart = codes.astype(dtype).reshape(*outer, groups, -1, outputs)
    scale, offset = (each.astype(dtype)[..., None, :] for each in (scale, offset))
    return (apart * scale + offset).reshape(codes.shape)
