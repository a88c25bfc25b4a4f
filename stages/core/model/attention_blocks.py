"""Causal attention by blocks: value and gradient without ever storing the logits (heads x length x length).

Purpose: the logits grow with the square of the length: at 32,768 tokens those of one head are 4 GiB in float32. Here
queries and keys are walked in blocks with a running maximum and sum (Milakov and Gimelshein, 2018,
https://arxiv.org/abs/1805.02867), and the backward pass computes each block's weights again from the kept logarithm of
the sum, as flash attention does (Dao et al., 2022, https://arxiv.org/abs/2205.14135). Only pairs of blocks in which a
query may see a key are visited: up to the diagonal, and within the window.

Formulas, for a query q, keys k, values v, soft cap c (or none) and the loss' gradient g of the result o:
    z = c tanh(q.k / c)     s = log sum exp(z)     p = exp(z - s)     o = sum p v
    dv = p g      dz = p (g.v - g.o)      d(q.k) = dz (1 - (z / c)^2)      dq = sum d(q.k) k      dk = sum d(q.k) q
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The logits of what is masked: finite, so that a row of which a block shows nothing has no NaN.
MASKED = float(jnp.finfo(jnp.float32).min)
# No token's segment: of what is added at the end to fill a block.
NOWHERE = -1


@dataclass(frozen=True)
class Scope:
    """Which keys queries see, and how.

    Attributes:
        window: tokens that a query sees back, itself included; None: all.
        soft_cap: of the logits; None: none.
        size: tokens of a block of queries, and of keys.
        parts: devices that each have a part of the queries, in their order; all have all keys.
    """

    window: int | None
    soft_cap: float | None
    size: int
    parts: int = 1


class _Pairs(NamedTuple):
    """Pairs of blocks, those of one block of queries in a row.

    Attributes:
        rows, columns: int32 (pairs,), numbers of the block of queries and of keys.
        begin: bool (pairs,), whether the block of queries is a new one.
        counts: bool (pairs,); false for what fills up the list of a part that has fewer than another.
    """

    rows: jax.Array
    columns: jax.Array
    begin: jax.Array
    counts: jax.Array


class _Blocked(NamedTuple):
    """Arrays with whole blocks, heads before tokens.

    Attributes:
        query: (batch, groups, heads of a group, queries, head).
        key, value: (batch, groups, keys, head), in the dtype of the queries.
        own, others: int32 (batch, queries) and (batch, keys), segment ids.
        first: int32 (), the place of the first query among the keys.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    own: jax.Array
    others: jax.Array
    first: jax.Array


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    own: jax.Array,
    others: jax.Array,
    part: jax.Array,
    scope: Scope,
) -> jax.Array:
    """Return the values that each query attends to.

    Args:
        query: (batch, queries, heads, head), already scaled; the part of this device where `scope.parts` have some.
        key, value: (batch, keys, groups, head); consecutive heads share a group. Products are in the dtype of the
            queries, sums and the softmax in float32; gradients come in the dtype of the keys, summed in float32.
        own, others: int32 (batch, queries) and (batch, keys), segment ids, not negative; a query sees its own segment.
        part: int32 (), which part of the queries this is, from 0.
        scope: window, soft cap and blocks.

    Returns:
        (batch, queries, heads, head) in the dtype of the queries.
    """
    return _attend(query, key, value, own, others, part, scope)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, own: jax.Array, others: jax.Array, part: jax.Array, scope: Scope
) -> jax.Array:
    return _attend_forward(query, key, value, own, others, part, scope)[0]


def _attend_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, own: jax.Array, others: jax.Array, part: jax.Array, scope: Scope
) -> tuple[jax.Array, Any]:
    arrays = _blocked(query, key, value, own, others, part, scope)
    result, log_sum = _walk_forward(arrays, _pairs(query, key, part, scope), scope)
    narrow = (query, key.astype(query.dtype), value.astype(query.dtype), own, others, part)
    # Of no elements: only to know the dtype of the keys' gradient.
    like = jnp.zeros((0,), key.dtype)
    return _as_given(result, query), (narrow, like, _as_given(result, query), log_sum)


def _attend_backward(scope: Scope, kept: Any, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    (query, key, value, own, others, part), like, result, log_sum = kept
    arrays = _blocked(query, key, value, own, others, part, scope)
    groups = key.shape[2]
    gradient = gradient.astype(query.dtype)
    # What a logit's gradient is compared with, g.o, of each query: (batch, groups, heads of a group, queries).
    along = jnp.sum(gradient.astype(jnp.float32) * result.astype(jnp.float32), axis=-1, keepdims=True)
    along = _heads_first(along, groups, scope.size)[..., 0]
    blocked = _heads_first(gradient, groups, scope.size)
    of_query, of_key, of_value = _walk_backward(arrays, blocked, along, log_sum, _pairs(query, key, part, scope), scope)
    of_key, of_value = (each.swapaxes(1, 2)[:, : key.shape[1]].astype(like.dtype) for each in (of_key, of_value))
    return _as_given(of_query, query).astype(query.dtype), of_key, of_value, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _walk_forward(arrays: _Blocked, pairs: _Pairs, scope: Scope) -> tuple[jax.Array, jax.Array]:
    """Return the result, as the blocked queries, and each query's logarithm of the sum, float32 without the head."""
    shape = (*arrays.query.shape[:3], scope.size)
    dtype = arrays.query.dtype

    def visit(carry: Any, pair: _Pairs) -> tuple[Any, None]:
        (largest, total, mixed), result, log_sum = carry
        begun = (jnp.full_like(largest, MASKED), jnp.zeros_like(total), jnp.zeros_like(mixed))
        largest, total, mixed = (
            jnp.where(pair.begin, new, old) for new, old in zip(begun, (largest, total, mixed), strict=True)
        )
        logits, value = _logits(arrays, pair, scope), _block(arrays.value, pair.columns, scope, 2)
        new = jnp.maximum(largest, logits.max(axis=-1))
        shrunk = jnp.exp(largest - new)
        weights = jnp.exp(logits - new[..., None])
        total = total * shrunk + weights.sum(axis=-1)
        mixed = mixed * shrunk[..., None] + _product("bgrts,bgsh->bgrth", weights.astype(dtype), value)
        result = _put(result, (mixed / total[..., None]).astype(dtype), pair.rows, scope)
        log_sum = _put(log_sum, new + jnp.log(total), pair.rows, scope)
        return ((new, total, mixed), result, log_sum), None

    running = (jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((*shape, arrays.query.shape[-1])))
    found = (jnp.zeros_like(arrays.query), jnp.zeros(arrays.query.shape[:4]))
    (_, result, log_sum), _ = jax.lax.scan(visit, (running, *found), pairs)
    return result, log_sum


def _walk_backward(
    arrays: _Blocked, gradient: jax.Array, along: jax.Array, log_sum: jax.Array, pairs: _Pairs, scope: Scope
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of queries, keys and values as blocked, in float32."""
    dtype = arrays.query.dtype

    def visit(carry: Any, pair: _Pairs) -> tuple[Any, None]:
        of_query, of_key, of_value = carry
        row = functools.partial(_block, place=pair.rows, scope=scope, axis=3)
        query, g = row(arrays.query), row(gradient)
        key, value = (_block(each, pair.columns, scope, 2) for each in (arrays.key, arrays.value))
        logits = _logits(arrays, pair, scope)
        weights = jnp.exp(logits - row(log_sum)[..., None])
        slope = weights * (_product("bgrth,bgsh->bgrts", g, value) - row(along)[..., None])
        if scope.soft_cap is not None:
            # Of what is masked the weights are zero, but the logits are no tangent's.
            slope = slope * (1.0 - jnp.square(jnp.maximum(logits, -scope.soft_cap) / scope.soft_cap))
        slope = slope.astype(dtype)
        of_value = _add(of_value, _product("bgrts,bgrth->bgsh", weights.astype(dtype), g), pair.columns, scope)
        of_key = _add(of_key, _product("bgrts,bgrth->bgsh", slope, query), pair.columns, scope)
        of_query = _add(of_query, _product("bgrts,bgsh->bgrth", slope, key), pair.rows, scope)
        return (of_query, of_key, of_value), None

    zeros = tuple(jnp.zeros(each.shape) for each in (arrays.query, arrays.key, arrays.value))
    found, _ = jax.lax.scan(visit, zeros, pairs)
    return found


def _logits(arrays: _Blocked, pair: _Pairs, scope: Scope) -> jax.Array:
    """Return a pair's logits, capped and masked: float32 (batch, groups, heads of a group, queries, keys)."""
    query = _block(arrays.query, pair.rows, scope, 3)
    logits = _product("bgrth,bgsh->bgrts", query, _block(arrays.key, pair.columns, scope, 2))
    if scope.soft_cap is not None:
        logits = scope.soft_cap * jnp.tanh(logits / scope.soft_cap)
    places = jnp.arange(scope.size, dtype=jnp.int32)
    back = (arrays.first + pair.rows * scope.size + places)[:, None] - (pair.columns * scope.size + places)[None, :]
    seen = (back >= 0) & pair.counts
    if scope.window is not None:
        seen &= back < scope.window
    own, others = _block(arrays.own, pair.rows, scope, 1), _block(arrays.others, pair.columns, scope, 1)
    seen = seen & (own[:, :, None] == others[:, None, :])
    return jnp.where(seen[:, None, None], logits, MASKED)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return an einsum of two arrays of one dtype, summed in float32."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _block(array: jax.Array, place: jax.Array, scope: Scope, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, place * scope.size, scope.size, axis)


def _put(array: jax.Array, block: jax.Array, place: jax.Array, scope: Scope) -> jax.Array:
    """Put a block of queries into an array (batch, groups, heads of a group, queries, ...)."""
    return jax.lax.dynamic_update_slice_in_dim(array, block, place * scope.size, 3)


def _add(array: jax.Array, block: jax.Array, place: jax.Array, scope: Scope) -> jax.Array:
    """Add a block of tokens to an array (..., tokens, head)."""
    axis = array.ndim - 2
    return jax.lax.dynamic_update_slice_in_dim(
        array, _block(array, place, scope, axis) + block, place * scope.size, axis
    )


def _blocked(
    query: jax.Array, key: jax.Array, value: jax.Array, own: jax.Array, others: jax.Array, part: jax.Array, scope: Scope
) -> _Blocked:
    groups = key.shape[2]
    keys, values = (_filled(each.astype(query.dtype), scope.size).swapaxes(1, 2) for each in (key, value))
    return _Blocked(
        _heads_first(query, groups, scope.size),
        keys,
        values,
        _filled(own, scope.size, NOWHERE),
        _filled(others, scope.size, NOWHERE),
        part * query.shape[1],
    )


def _heads_first(array: jax.Array, groups: int, size: int) -> jax.Array:
    """Return (batch, queries, heads, n) as (batch, groups, heads of a group, queries of whole blocks, n)."""
    array = _filled(array, size)
    array = array.reshape(*array.shape[:2], groups, array.shape[2] // groups, array.shape[3])
    return array.transpose(0, 2, 3, 1, 4)


def _as_given(array: jax.Array, query: jax.Array) -> jax.Array:
    """Return what is blocked as the queries are in their shape as given."""
    return array.transpose(0, 3, 1, 2, 4)[:, : query.shape[1]].reshape(query.shape)


def _filled(array: jax.Array, size: int, filling: int = 0) -> jax.Array:
    """Return an array with more tokens at the end of its second axis, for whole blocks."""
    missing = -array.shape[1] % size
    widths = [(0, 0)] * array.ndim
    widths[1] = (0, missing)
    return jnp.pad(array, widths, constant_values=filling) if missing else array


def _pairs(query: jax.Array, key: jax.Array, part: jax.Array, scope: Scope) -> _Pairs:
    """Return the pairs of blocks that a part visits."""
    lists = [list_pairs(query.shape[1], number, scope) for number in range(scope.parts)]
    most = max(len(each) for each in lists)
    rows = np.array([[*each, *[each[-1]] * (most - len(each))] for each in lists], np.int32)
    begin = np.concatenate([np.ones_like(rows[:, :1, 0]), np.diff(rows[..., 0])], axis=1) != 0
    counts = np.arange(most) < np.array([[len(each)] for each in lists])
    found = (rows[..., 0], rows[..., 1], begin, counts)
    return _Pairs(*(jnp.asarray(each)[part] if scope.parts > 1 else jnp.asarray(each[0]) for each in found))


def list_pairs(queries: int, part: int, scope: Scope) -> list[tuple[int, int]]:
    """Return the pairs (block of queries, block of keys) in which some query may see some key, row by row.

    Args:
        queries: of a part.
        part: its number.
        scope: window and blocks.

    Example:
        >>> list_pairs(6, 0, Scope(window=3, soft_cap=None, size=2))
        [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]
    """
    found = []
    for row in range(-(-queries // scope.size)):
        first = part * queries + row * scope.size
        last = part * queries + min(queries, (row + 1) * scope.size) - 1
        begin = 0 if scope.window is None else max(0, first - scope.window + 1)
        found += [(row, column) for column in range(begin // scope.size, last // scope.size + 1)]
    return found
