"""Attention of a sequence's tokens to each other: plain, or by blocks where the sequence is long or a TPU's kernel can.

Purpose: the one place that decides how. Plain, the logits (batch, heads, length, length) are stored, which is fastest
for short sequences, except on a TPU, whose kernel (`attention_splash`) keeps them on the chip. By blocks
(`attention_blocks`), no array grows with the square of the length, not even a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from stages.core.model import attention_blocks, attention_splash
from stages.core.model.activations import Activations
from stages.core.model.attention_blocks import Scope
from stages.core.model.products import product
from stages.core.presets.layer_kinds import LayerKind
from stages.core.sharding.layout import axes_of

# Takes a block's queries, keys and values (batch, length, heads, head) and returns what each query attends to.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Tokens from which a sequence is walked in blocks, and tokens of a block.
LONG = 4096
BLOCK = 512
# Those of shorter sequences, which only a kernel walks in blocks: the largest that divides a device's tokens.
SHORT_BLOCKS = (512, 256, 128)
AXIS = "model"


class _Way(NamedTuple):
    """How the devices of a mesh attend: what they have a part of each, the blocks, and a TPU's kernel if it can."""

    time: bool
    heads: bool
    keys: bool
    scope: Scope
    kernel: Any


class SelfAttention:
    """Attention among the tokens of one pass: each to those up to itself, in its own segment and within a window."""

    def __init__(self, segment_ids: jax.Array, activations: Activations) -> None:
        """Prepare what all of a model's blocks share.

        Args:
            segment_ids: int32 (batch, length), not negative; padding has a number of its own (0).
            activations: how queries and keys are sharded.
        """
        length = segment_ids.shape[1]
        self._segment_ids, self._activations = segment_ids, activations
        # Of short sequences, unless a kernel attends in every block; a mask that is not used is not in the program.
        self._mask = causal_mask(segment_ids) if length < LONG else None
        # A constant with one row for the whole batch: the compiler folds the sliding windows once.
        self._positions = np.arange(length, dtype=np.int32)[None, :]

    def of_block(self, number: int, kind: LayerKind, soft_cap: float | None) -> Attend:
        """Return the attention of one of the model's blocks.

        Args:
            number: the block's.
            kind: of the block.
            soft_cap: of its logits; None: none.
        """

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            keys_of = number if kind.keys_of is None else kind.keys_of
            way = self._way(query, key, (number, keys_of), kind.window, soft_cap)
            mask = self._mask
            if way is not None and (mask is None or way.kernel is not None):
                return self._by_devices(way, query, key, value)
            if mask is None:
                key, value = key.astype(jnp.float32), value.astype(jnp.float32)
                ids, scope = self._segment_ids, Scope(kind.window, soft_cap, BLOCK)
                return attention_blocks.attend(query, key, value, ids, ids, jnp.int32(0), scope)
            if kind.window is not None:
                mask = mask & (self._positions[:, :, None] - self._positions[:, None, :] < kind.window)
            # Logits and their softmax grow with the square of the length, and are soon computed again: they are not
            # kept.
            return jax.checkpoint(_mix, static_argnums=4)(query, key, value, mask, soft_cap)

        return attend

    def _way(
        self, query: jax.Array, key: jax.Array, numbers: tuple[int, int], window: int | None, soft_cap: float | None
    ) -> _Way | None:
        """Return how devices attend, None without a mesh; the blocks' numbers are those of queries and of keys."""
        mesh = self._activations.mesh
        if mesh is None:
            return None
        own = self._activations.spec(query, "query", numbers[0])
        keys = self._activations.spec(key, "key", numbers[1])
        time, heads, keys_too = (AXIS in axes_of(each) for each in (own[1], own[2], keys[2]))
        _, length, count, head = query.shape
        devices = mesh.shape[AXIS]
        queries = length // devices if time else length
        size = BLOCK if length >= LONG else next((each for each in SHORT_BLOCKS if queries % each == 0), BLOCK)
        scope = Scope(window, soft_cap, size, devices if time else 1)
        kernel = None
        if mesh.devices.flat[0].platform == "tpu" and attention_splash.expresses(scope, queries, head, query.dtype):
            kernel = attention_splash.kernel(scope, length, count // devices if heads else count)
        # Keys that are split where queries are not are gathered.
        return _Way(time, heads, keys_too and heads, scope, kernel)

    def _by_devices(self, way: _Way, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Return what each query attends to, block by block: each device for the queries and heads that it has."""
        mesh, segments, kernel = self._activations.mesh, self._segment_ids, way.kernel
        # The gradients of keys and values are sums over queries, which devices may have a part of each.
        key, value = key.astype(jnp.float32), value.astype(jnp.float32)
        ratio = query.shape[2] // key.shape[2]
        split = AXIS if way.time else None

        def local(
            kernel: Any, query: jax.Array, key: jax.Array, value: jax.Array, own: jax.Array, others: jax.Array
        ) -> jax.Array:
            device = jax.lax.axis_index(AXIS)
            if way.heads and not way.keys:
                key, value = (groups_of(each, device, query.shape[2], ratio) for each in (key, value))
            if kernel is not None:
                return attention_splash.attend(kernel, query, key, value, own, others, way.scope)
            part = device if way.time else jnp.int32(0)
            return attention_blocks.attend(query, key, value, own, others, part, way.scope)

        of_query = P("batch", split, AXIS if way.heads else None, None)
        of_key = P("batch", None, AXIS if way.keys else None, None)
        of_kernel = P() if kernel is None else attention_splash.kernel_spec(kernel, mesh, split)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(of_kernel, of_query, of_key, of_key, P("batch", split), P("batch", None)),
            out_specs=of_query,
            # Its gradient is written by hand, and JAX sums what all devices have of the keys'.
            check_vma=False,
        )(kernel, query, key, value, segments, segments)


def groups_of(key: jax.Array, device: jax.Array, heads: int, ratio: int) -> jax.Array:
    """Return the groups that a device's heads share, of all of them.

    Args:
        key: (batch, keys, groups, head), or values.
        device: int32 (), its number; each has as many heads.
        heads: of queries that it has.
        ratio: heads of queries that share a group.

    Returns:
        (batch, keys, n, head); where the heads do not make whole groups or are within one, one for each head.
    """
    if heads % ratio and ratio % heads:
        return jnp.take(key, (device * heads + jnp.arange(heads)) // ratio, axis=2)
    return jax.lax.dynamic_slice_in_dim(key, device * heads // ratio, max(1, heads // ratio), axis=2)


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """Return which positions each position may attend to: those up to itself within its own segment.

    Args:
        segment_ids: int32 (batch, length); padding has a number of its own (0) and sees only itself.

    Returns:
        bool (batch, length, length), true where the query (second axis) may attend to the key (third).
    """
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & jnp.tril(jnp.ones((length, length), bool))


def _mix(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, soft_cap: float | None) -> jax.Array:
    """Return the values that each query attends to: (batch, length, heads, head), keys and values by group of heads."""
    batch, length, heads, head = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, head)
    # The gradients of keys and values are sums over queries, which devices may have a part of each.
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)
    logits = product("btkgh,bskh->bkgts", query, key).astype(jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    return product("bkgts,bskh->btkgh", weights, value).reshape(batch, length, heads, head)
