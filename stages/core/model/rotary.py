"""Rotary position embeddings: queries and keys rotated by their positions, with angles computed once per pass.

Purpose: by default XLA recomputes each angle's sine and cosine for every head, block and direction, inside the products
that use them; on a CPU that cost more than the products. The backward pass of a rotation is the rotation by the
opposite angle: written explicitly, it needs no padding of halves, which JAX would derive.
Formula: https://arxiv.org/abs/2104.09864, with keras-hub's linear scaling of positions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from stages.core.presets.layer_kinds import LayerKind

# Cosine and sine, each (batch or 1, length, 1, head / 2).
Angles = tuple[jax.Array, jax.Array]


class Rotary:
    """Rotates queries and keys of one forward pass."""

    def __init__(self, kinds: Sequence[LayerKind], positions: jax.Array, *, interleaved: bool) -> None:
        """Compute the angles of each kind of block.

        Args:
            kinds: of the blocks.
            positions: int32 (batch, length), or (1, length) where all rows are alike.
            interleaved: whether results alternate between the two halves, as the original checkpoints' heads of Gemma
                and Gemma 2 do, or follow one another.
        """
        self._interleaved = interleaved
        by_rope = {kind.rope: kind for kind in kinds}
        found = {rope: _angles(kind, positions) for rope, kind in by_rope.items()}
        # Without the barrier the compiler moves sine and cosine into every product that takes them.
        self._angles: dict[tuple[float, float, int, int], Angles] = jax.lax.optimization_barrier(found)

    def __call__(self, kind: LayerKind, x: jax.Array) -> jax.Array:
        """Rotate queries or keys (batch, length, heads, head) as blocks of a kind do."""
        cos, sin = self._angles[kind.rope]
        return _rotate(x, cos.astype(x.dtype), sin.astype(x.dtype), self._interleaved)


def _angles(kind: LayerKind, positions: jax.Array) -> Angles:
    half = kind.head // 2
    frequencies = kind.wavelength ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if kind.turned < half:
        # By an angle of zero: the cosine is 1 and the sine 0 exactly.
        frequencies = jnp.where(jnp.arange(half) < kind.turned, frequencies, 0.0)
    angles = (jnp.asarray(positions, jnp.float32) / kind.rope_scaling)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.stack(rotated, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(rotated, axis=-1)


def _rotate_forward(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> tuple[jax.Array, Angles]:
    return _rotate(x, cos, sin, interleaved), (cos, sin)


def _rotate_backward(interleaved: bool, angles: Angles, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = angles
    if interleaved:
        pairs = gradient.reshape(*gradient.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(gradient, 2, axis=-1)
    return jnp.concatenate((first * cos + second * sin, second * cos - first * sin), axis=-1), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)
