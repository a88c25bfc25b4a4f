"""Rotary position embeddings: queries and keys rotated by their positions, with angles computed once per pass.

Purpose: by default XLA recomputes each angle's sine and cosine for every head, block and direction, inside the products
that use them; on a CPU that cost more than the products. The backward pass of a rotation is the rotation by the
opposite angle: written explicitly, it needs no padding of halves, which JAX would derive.

Formula: https://arxiv.org/abs/2104.09864, with keras-hub's linear scaling of positions. Each number of a head's first
half is turned with the one at its place in the second. keras-hub's Gemma and Gemma 2 then alternate between the halves;
that is left out, since a query's product with a key is the same in any order of both, and on a TPU a head would be
written anew for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stages.core.presets.layer_kinds import LayerKind

# Cosine and sine, each (batch or 1, length, 1, head / 2).
Angles = tuple[jax.Array, jax.Array]


class Rotary:
    """Rotates queries and keys of one forward pass."""

    def __init__(self, kinds: Sequence[LayerKind], positions: jax.Array) -> None:
        """Compute the angles of each kind of block.

        Args:
            kinds: of the blocks.
            positions: int32 (batch, length), or (1, length) where all rows are alike.
        """
        by_rope = {kind.rope: kind for kind in kinds}
        found = {rope: _angles(kind, positions) for rope, kind in by_rope.items()}
        # Without the barrier the compiler moves sine and cosine into every product that takes them.
        self._angles: dict[tuple[float, float, int, int], Angles] = jax.lax.optimization_barrier(found)

    def __call__(self, kind: LayerKind, x: jax.Array) -> jax.Array:
        """Rotate queries or keys (batch, length, heads, head) as blocks of a kind do."""
        cos, sin = self._angles[kind.rope]
        return _rotate(x, cos.astype(x.dtype), sin.astype(x.dtype))


def _angles(kind: LayerKind, positions: jax.Array) -> Angles:
    half = kind.head // 2
    frequencies = kind.wavelength ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if kind.turned < half:
        # By an angle of zero: the cosine is 1 and the sine 0 exactly.
        frequencies = jnp.where(jnp.arange(half) < kind.turned, frequencies, 0.0)
    angles = (jnp.asarray(positions, jnp.float32) / kind.rope_scaling)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


@jax.custom_vjp
def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    if x.dtype != jnp.bfloat16 or x.shape[1] == 1:
        return _by_halves(x, cos, sin)
    return jax.lax.platform_dependent(x, cos, sin, tpu=_by_product, default=_by_halves)


def _by_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Swap the halves by a product with a matrix of 0, 1 and -1, of which each number is one of `x`, exactly.

    A TPU's compiler makes one fusion of it, where it writes halves that are taken apart and joined to memory, twice.
    """
    half = x.shape[-1] // 2
    swap = np.zeros((2 * half, 2 * half), np.float32)
    swap[half + np.arange(half), np.arange(half)] = -1.0
    swap[np.arange(half), half + np.arange(half)] = 1.0
    swapped = jnp.einsum("btnh,hg->btng", x, jnp.asarray(swap, x.dtype), precision=jax.lax.Precision.DEFAULT)
    return x * jnp.concatenate((cos, cos), axis=-1) + swapped * jnp.concatenate((sin, sin), axis=-1)


def _rotate_forward(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, Angles]:
    return _rotate(x, cos, sin), (cos, sin)


def _rotate_backward(angles: Angles, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = angles
    return _rotate(gradient, cos, -sin), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)
