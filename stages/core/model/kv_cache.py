"""The keys and values that one block keeps of a row's tokens, and attention of one new token to them.

Purpose: a token costs what reading the cache costs. The layout, heads before tokens, is the one in which both products
take keys and values in their own order; a cache with a sliding window has no place for what no later token can attend
to. A new token is not in the cache yet while it attends: what is written first and read then, XLA on the CPU makes
twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Keys and values, each (batch, key/value heads, places, head). Token t of a row is at place t modulo their number.
Cache = tuple[jax.Array, jax.Array]


def latest(x: jax.Array, size: int) -> jax.Array:
    """Return the last of a row's first keys or values (batch, tokens, heads, head) in a cache of `size` places."""
    count = x.shape[1]
    x = jnp.swapaxes(x, 1, 2)
    if count <= size:
        return jnp.pad(x, ((0, 0), (0, 0), (0, size - count), (0, 0)))
    return jnp.roll(x[:, :, count - size :], count % size, axis=2)


def added(cache: Cache, key: jax.Array, value: jax.Array, token: jax.Array) -> Cache:
    """Return a cache with the key and value (batch, 1, heads, head) of the row's `token`, int32 ()."""
    at = (0, 0, token % cache[0].shape[2], 0)
    keys, values = (
        jax.lax.dynamic_update_slice(old, jnp.swapaxes(new, 1, 2), at)
        for old, new in zip(cache, (key, value), strict=True)
    )
    return keys, values


def before(size: int, token: jax.Array, first: jax.Array) -> jax.Array:
    """Return at which places there are tokens that `token` may attend to, bool (batch, size).

    Args:
        size: places of the cache.
        token: int32 (), which is not in the cache yet; it takes the place of one that is outside of the window.
        first: int32 (batch,), the first of each row that is no padding.
    """
    held = token - (token - jnp.arange(size, dtype=jnp.int32)) % size
    return (held >= first[:, None]) & (held < token)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, cache: Cache, mask: jax.Array, soft_cap: float | None
) -> jax.Array:
    """Return the values that each row's one query attends to, (batch, 1, heads, head).

    Args:
        query: scaled, (batch, 1, heads, head).
        key: of the same token, as its value (batch, 1, key/value heads, head).
        value: of the same token.
        cache: of the tokens before it.
        mask: bool (batch, places), see `before`.
        soft_cap: of the logits.
    """
    keys, values = cache
    batch, _, heads, head = query.shape
    groups = keys.shape[1]
    query = query.reshape(batch, groups, heads // groups, head)
    key, value = key.reshape(batch, groups, 1, head), value.reshape(batch, groups, 1, head)
    earlier = jnp.swapaxes(_product(keys, query, 3), 2, 3)
    own = jnp.sum(query * key, axis=-1, keepdims=True)
    logits = jnp.concatenate([earlier, own], axis=-1).astype(jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    mask = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1).astype(query.dtype)
    mixed = _product(weights[..., :-1], values, 2) + weights[..., -1:] * value
    return mixed.reshape(batch, 1, heads, head)


def _product(one: jax.Array, other: jax.Array, contracted: int) -> jax.Array:
    """Multiply (batch, heads, rows, n) with a matrix whose dimension `contracted` is n, of each batch and head."""
    return jax.lax.dot_general(one, other, (((3,), (contracted,)), ((0, 1), (0, 1))))
