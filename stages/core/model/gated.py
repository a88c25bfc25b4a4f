"""The gated activation of a feed-forward layer: gelu(gate) * up, and its gradients, each computed once.

The TPU compiler fuses what enters a matrix product into the product, which computes it anew for each tile of the
result. On the way back that is GELU's derivative, for both gradients. The barrier makes both a result of the product
before. By the compiler's estimate that saves 5 % of four blocks of Gemma 3 27B and the head (docs/training.md).
"""

from __future__ import annotations

import jax


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return gelu(gate) * up, element by element, with GELU's approximation by tanh (https://arxiv.org/abs/1606.08415).

    Args:
        gate: an activation of any shape.
        up: another of the same shape and dtype.
    """
    gate, up = _gradients_once(gate, up)
    return jax.nn.gelu(gate, approximate=True) * up


@jax.custom_vjp
def _gradients_once(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return both as they are."""
    return gate, up


def _forward(gate: jax.Array, up: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    return (gate, up), None


def _backward(_: None, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return jax.lax.optimization_barrier(gradients)


_gradients_once.defvjp(_forward, _backward)
