"""Matrix products in bfloat16 whose gradients are summed in float32, of gathered weights, joined, and of few rows.

Purpose of the first: the gradient of a weight is a sum over all tokens of a step: over those of a device, over the
devices of the batch axis, over the batches of a group. Derived from `einsum(x, w.astype(bfloat16))` each part of that
sum is rounded to bfloat16, 8 bits, before it is added: a part below 1/256 of the sum is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# The mesh axis that weights may be split over in addition.
BATCH = "batch"
# Up to this many rows, reading the matrix once per row, or once for all rows together, beats XLA's product on the CPU,
# which first copies the whole matrix into another order. Measured with 4 rows: 1.7 and 2 times as fast.
FEW_ROWS = 4
# Bytes of a matrix that is still in a processor's cache when the next row reads it.
CACHED_BYTES = 16 << 20
# Up to this many outputs per token and device, one product for the gradient of a common input beats one for each part,
# by a TPU compiler's estimates: of 1,536 by 9 to 28 %, of 2,048 by 9 % or not at all. Of 12,288 it takes 1.7 times as
# long.
MOST_JOINED = 1536


def few_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return x w, in the dtype of both, without a gradient: (rows, n) and (n, m) to (rows, m)."""
    if x.shape[0] > FEW_ROWS or w.size * w.dtype.itemsize > CACHED_BYTES:
        return x @ w
    return jax.lax.platform_dependent(
        x, w, cpu=lambda x, w: jnp.stack([x[row] @ w for row in range(x.shape[0])]), default=jnp.matmul
    )


def few_rows_transposed(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return x times w transposed, float32, without a gradient: (rows, n) and (m, n) to (rows, m).

    Products are in the dtype of `x`; `w` may be of int8 codes.
    """

    def multiplied(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("rn,mn->rm", x, w.astype(x.dtype), preferred_element_type=jnp.float32)

    def summed(x: jax.Array, w: jax.Array) -> jax.Array:
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
        # Of one row among rows XLA's CPU compiler makes a loop that takes twenty times as long as of a row by itself.
        return jnp.sum(w * x[0], axis=-1)[None] if len(x) == 1 else jnp.sum(w * x[:, None], axis=-1)

    if x.shape[0] > FEW_ROWS:
        return multiplied(x, w)
    return jax.lax.platform_dependent(x, w, cpu=summed, default=multiplied)


def product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Return an einsum in the dtype of `x`; its gradient with respect to `w` is computed and summed in that of `w`.

    Args:
        equation: of two operands, without an ellipsis; each index of `w` is one of `x` or of the result.
        x: an activation, in the compute dtype.
        w: a weight, or keys or values, in the compute dtype or float32; its gradient is a sum over tokens.

    Returns:
        The product in the dtype of `x`.
    """
    if w.dtype == x.dtype:
        return jnp.einsum(equation, x, w)
    # Inside `shard_map` the sum over devices is this cast's backward pass, so it must be of `w` in its own dtype.
    return _product(equation, varying_as(x, w), varying_as(w, x))


def gathered(w: jax.Array, dimension: int, dtype: Any) -> jax.Array:
    """Return the whole of a weight of which each device of the batch axis has a part; inside `shard_map`.

    Args:
        w: a device's part.
        dimension: that it is split in.
        dtype: in which it is sent and returned.
    """
    return jax.lax.all_gather(w.astype(dtype), BATCH, axis=dimension, tiled=True)


def gathered_product(equation: str, x: jax.Array, w: jax.Array, dimension: int, *, again: bool) -> jax.Array:
    """Do what `product` does with a weight of which each device of the batch axis has a part; inside `shard_map`.

    What is sent is in the dtype of `x`. The gradient is computed and summed in the dtype of `w`, and each device gets
    that of its part.

    Args:
        equation: as for `product`.
        x: an activation.
        w: a device's part of the weight.
        dimension: that it is split in.
        again: gather the weight once more in the backward pass; else it is kept until then.
    """
    return _gathered_product(equation, dimension, again, varying_as(x, w), varying_as(w, x))


def varying_as(array: jax.Array, other: jax.Array) -> jax.Array:
    """Mark an array as one of each device, over the mesh axes that another is one of each device over."""
    own, wanted = (jax.typeof(each).manual_axis_type.varying for each in (array, other))
    return jax.lax.pcast(array, tuple(sorted(wanted - own)), to="varying")


@jax.custom_vjp
def joined_products(x: jax.Array, kernels: Sequence[jax.Array]) -> list[jax.Array]:
    """Multiply an activation with several frozen kernels of whole heads.

    The gradient of `x` is one product over the heads of all, instead of one for each kernel and their sum. The kernels
    get no gradient.

    Args:
        x: (batch, length, hidden).
        kernels: (heads, hidden, head), in the dtype of `x`; their numbers of heads may differ.

    Returns:
        Of each (batch, length, heads, head).
    """
    return [jnp.einsum("bsd,kdh->bskh", x, kernel) for kernel in kernels]


def _joined_forward(x: jax.Array, kernels: Sequence[jax.Array]) -> tuple[list[jax.Array], Sequence[jax.Array]]:
    return joined_products(x, kernels), kernels


def _joined_backward(kernels: Sequence[jax.Array], gradients: Sequence[jax.Array]) -> tuple[jax.Array, None]:
    heads, kernel = jnp.concatenate(gradients, axis=2), jnp.concatenate(kernels, axis=0)
    return jnp.einsum("bskh,kdh->bsd", heads, kernel), None


joined_products.defvjp(_joined_forward, _joined_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, w.astype(x.dtype))


def _product_forward(equation: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    return _product(equation, x, w), (x, w)


def _product_backward(equation: str, operands: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = operands
    inputs, result = equation.split("->")
    of_x, of_w = inputs.split(",")
    return (
        jnp.einsum(f"{result},{of_w}->{of_x}", gradient, w.astype(x.dtype)),
        jnp.einsum(f"{of_x},{result}->{of_w}", x, gradient, preferred_element_type=w.dtype),
    )


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered_product(equation: str, dimension: int, again: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    return _gathered_forward(equation, dimension, again, x, w)[0]


def _gathered_forward(
    equation: str, dimension: int, again: bool, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    whole = gathered(w, dimension, x.dtype)
    return jnp.einsum(equation, x, whole), (x, w, None if again else whole)


def _gathered_backward(
    equation: str, dimension: int, again: bool, kept: Any, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w, whole = kept
    if again:
        # Without the barrier XLA takes this for the gathering of the forward pass, and keeps every weight whole.
        part, gradient = jax.lax.optimization_barrier((w, gradient))
        whole = gathered(part, dimension, x.dtype)
    inputs, result = equation.split("->")
    of_x, of_w = inputs.split(",")
    of_whole = jnp.einsum(f"{of_x},{result}->{of_w}", x, gradient, preferred_element_type=w.dtype)
    return (
        jnp.einsum(f"{result},{of_w}->{of_x}", gradient, whole),
        jax.lax.psum_scatter(of_whole, BATCH, scatter_dimension=dimension, tiled=True),
    )


_gathered_product.defvjp(_gathered_forward, _gathered_backward)
