"""Products of rows that are sorted by expert, each row with the matrix of its expert, and the sorting itself.

Purpose: `jax.lax.ragged_dot` with gradients that a step can afford: that of a matrix is summed in the matrix' own
dtype, no copy of the matrices in the compute dtype lives until the backward pass, and rows are gathered on the way back
too, where JAX would derive a scatter. On TPUs it is a kernel, which takes int8 codes as they are; on GPUs, for which
there is none, `tiled_products`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from stages.core.model import tiled_products
from stages.core.model.codes import values_of
from stages.core.model.products import varying_as

_CONTRACTED = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def alike(*arrays: jax.Array | None) -> list[jax.Array | None]:
    """Mark arrays as ones of each device, over all mesh axes that any of them is one of each device over.

    Inside `shard_map` a function with a gradient of its own needs that.
    """
    given = [each for each in arrays if each is not None]
    return [None if each is None else functools.reduce(varying_as, given, each) for each in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ragged(
    trained: bool,
    flops: int,
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array | None,
    offset: jax.Array | None,
    of_row: jax.Array,
    sizes: jax.Array,
) -> jax.Array:
    """Multiply rows, each with the matrix of its expert.

    Args:
        trained: whether the matrices have a gradient, which is computed and summed in their dtype.
        flops: of the product, as far as its rows are of the experts here.
        x: (rows, inputs), sorted by expert, in the compute dtype.
        w: (experts, inputs, outputs), floats or codes.
        scale: of codes of 8 bits, float32 (experts, 1, outputs); of 4 bits (experts, groups, outputs).
        offset: of codes of 4 bits, as their scale.
        of_row: int32 (rows,), the expert of each row; their number for a row of none of them, which comes last.
        sizes: int32 (experts,), rows of each.

    Returns:
        (rows, outputs) in the compute dtype; not defined in rows of no expert.
    """
    matrices = _taken(w, scale, offset, x.dtype)
    with _counted(flops):
        y = jax.lax.platform_dependent(x, matrices, sizes, cpu=_masked, tpu=_by_kernel, default=_by_tiles)
    return _scaled(y, scale, offset, of_row)


def _ragged_forward(
    trained: bool,
    flops: int,
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array | None,
    offset: jax.Array | None,
    of_row: jax.Array,
    sizes: jax.Array,
) -> tuple[jax.Array, Any]:
    kept = (x if trained else None, w, scale, offset, of_row, sizes)
    return ragged(trained, flops, x, w, scale, offset, of_row, sizes), kept


def _ragged_backward(trained: bool, flops: int, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    x, w, scale, offset, of_row, sizes = kept
    # Without the barrier XLA keeps what it converted in the forward pass: a copy of all experts in the compute dtype.
    w, gradient = jax.lax.optimization_barrier((w, gradient))
    scaled = _scaled(gradient, scale, offset, of_row)
    matrices = _taken(w, scale, offset, scaled.dtype)
    with _counted(flops):
        of_x = jax.lax.platform_dependent(
            scaled,
            matrices,
            sizes,
            cpu=_masked_back,
            tpu=_by_kernel_back,
            default=functools.partial(_by_tiles, back=True),
        )
        of_w = None
        if trained:
            # XLA has no kernel for it on TPUs either.
            masked, tiles = (functools.partial(each, w.dtype) for each in (_of_matrices, _of_matrices_by_tiles))
            of_w = jax.lax.platform_dependent(x, gradient, sizes, cpu=masked, default=tiles)
    return of_x, of_w, None, None, None, None


ragged.defvjp(_ragged_forward, _ragged_backward)


def _masked(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, w.astype(x.dtype), sizes, _precision(x))


def _masked_back(gradient: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(gradient, jnp.swapaxes(w, 1, 2).astype(gradient.dtype), sizes, _precision(gradient))


def _by_kernel(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Return the product by the TPU's kernel.

    It converts codes as it reads them: converted before, all experts' would be written in bfloat16, twice the memory.
    """
    w = w if w.dtype == jnp.int8 and x.dtype == jnp.bfloat16 else w.astype(x.dtype)
    return jax.lax.ragged_dot(x, w, sizes, _precision(x), x.dtype)


def _by_kernel_back(gradient: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    # Not contracted with the matrices as they are: XLA would drop the name that contains the flops.
    return _by_kernel(gradient, jnp.swapaxes(w, 1, 2), sizes)


def _by_tiles(x: jax.Array, w: jax.Array, sizes: jax.Array, *, back: bool = False) -> jax.Array:
    return tiled_products.times(x, w, sizes, _precision(x), transposed=back)


def _of_matrices(dtype: Any, x: jax.Array, gradient: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot_general(x, gradient, sizes, _CONTRACTED, _precision(x), dtype)


def _of_matrices_by_tiles(dtype: Any, x: jax.Array, gradient: jax.Array, sizes: jax.Array) -> jax.Array:
    return tiled_products.gradient_of_matrices(x, gradient, sizes, _precision(x), dtype)


def _taken(w: jax.Array, scale: jax.Array | None, offset: jax.Array | None, dtype: Any) -> jax.Array:
    """Return matrices as the products take them: numbers, or codes of channels, whose scales leave the product."""
    return w if scale is None or offset is None else values_of(w, scale, offset, dtype)


def _scaled(rows: jax.Array, scale: jax.Array | None, offset: jax.Array | None, of_row: jax.Array) -> jax.Array:
    """Multiply each row with its expert's scales, in float32, if these are of channels."""
    if scale is None or offset is not None:
        return rows
    of_row = jnp.minimum(of_row, scale.shape[0] - 1)
    return (rows.astype(jnp.float32) * scale[:, 0][of_row]).astype(rows.dtype)


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    """Return the precision of products: the TPU's kernel refuses to make float32 ones of bfloat16 numbers."""
    return None if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _counted(flops: int) -> Any:
    """Name a product by its flops, the only cost of the kernel that a compiled program contains; `plan` reads them."""
    return jax.named_scope(f"ragged_product_flops_{flops}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread(chosen: int, y: jax.Array, order: jax.Array, back: jax.Array, here: jax.Array | None) -> jax.Array:
    """Return the row of its token for each of the sorted places.

    Args:
        chosen: places of a token, which follow each other before they are sorted.
        y: (tokens, n).
        order: int32 (places,), the place that is sorted to each.
        back: int32 (places,), where each place is sorted to.
        here: bool (tokens, chosen), the places whose gradients are summed; None: all.

    Returns:
        (places, n).
    """
    return y[order // chosen]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def collect(chosen: int, rows: jax.Array, order: jax.Array, back: jax.Array, here: jax.Array | None) -> jax.Array:
    """Return the sum of the sorted rows of each token, those of `here`, in float32: `spread` transposed.

    The gradient of the other rows is not zero: nothing may be made of it.
    """
    apart = rows[back].reshape(-1, chosen, rows.shape[-1]).astype(jnp.float32)
    # Not multiplied: a row that is not defined need not be finite.
    summed = apart if here is None else jnp.where(here[..., None], apart, 0.0)
    return jnp.sum(summed, axis=1).astype(rows.dtype)


# XLA would derive a scatter for each, which adds rows one after the other, rounded to the rows' dtype.
spread.defvjp(
    lambda chosen, y, *places: (spread(chosen, y, *places), places),
    lambda chosen, places, gradient: (collect(chosen, gradient, *places), None, None, None),
)
collect.defvjp(
    lambda chosen, rows, *places: (collect(chosen, rows, *places), places),
    lambda chosen, places, gradient: (spread(chosen, gradient, *places), None, None, None),
)
