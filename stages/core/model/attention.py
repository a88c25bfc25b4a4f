"""Attention of a sequence's tokens to each other: plain, or by blocks where the sequence is long.

Purpose: the one place that decides how. Plain, the logits (batch, heads, length, length) are stored, which is fastest
for short sequences; by blocks (`attention_blocks`) no array grows with the square of the length, a mask neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


class SelfAttention:
    """Attention among the tokens of one pass: each to those up to itself, in its own segment and within a window."""

    def __init__(self, segment_ids: jax.Array, activations: Activations) -> None:
        """Prepare what all of a model's blocks share.

        Args:
            segment_ids: int32 (batch, length), not negative; padding has a number of its own (0).
            activations: where queries and keys lie.
        """
        length = segment_ids.shape[1]
        self._segment_ids, self._activations = segment_ids, activations
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
            if self._mask is None:
                keys_of = number if kind.keys_of is None else kind.keys_of
                return self._by_blocks(query, key, value, (number, keys_of), kind.window, soft_cap)
            mask = self._mask
            if kind.window is not None:
                mask = mask & (self._positions[:, :, None] - self._positions[:, None, :] < kind.window)
            # Logits and their softmax grow with the square of the length, and are soon computed again: they are not
            # kept.
            return jax.checkpoint(_mix, static_argnums=4)(query, key, value, mask, soft_cap)

        return attend

    def _by_blocks(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        numbers: tuple[int, int],
        window: int | None,
        soft_cap: float | None,
    ) -> jax.Array:
        """Return what each query attends to; each device computes it for the queries and heads that it has.

        The numbers are those of the blocks that the queries and the keys are of.
        """
        mesh = self._activations.mesh
        # The gradients of keys and values are sums over queries, which devices may have a part of each.
        key, value = key.astype(jnp.float32), value.astype(jnp.float32)
        segments = self._segment_ids
        if mesh is None:
            scope = Scope(window, soft_cap, BLOCK)
            return attention_blocks.attend(query, key, value, segments, segments, jnp.int32(0), scope)
        own = self._activations.spec(query, "query", numbers[0])
        keys = self._activations.spec(key, "key", numbers[1])
        axis = "model"
        devices = mesh.shape[axis]
        time, heads, keys_too = (axis in axes_of(each) for each in (own[1], own[2], keys[2]))
        # Keys that are split where queries are not are gathered.
        keys_too = keys_too and heads
        ratio = query.shape[2] // key.shape[2]
        scope = Scope(window, soft_cap, BLOCK, devices if time else 1)
        kernel = self._kernel(query, scope, devices if heads else 1)
        split = axis if time else None

        def local(
            kernel: Any, query: jax.Array, key: jax.Array, value: jax.Array, own: jax.Array, others: jax.Array
        ) -> jax.Array:
            device = jax.lax.axis_index(axis)
            if heads and not keys_too:
                key, value = (groups_of(each, device, query.shape[2], ratio) for each in (key, value))
            if kernel is not None:
                return attention_splash.attend(kernel, query, key, value, own, others, scope)
            part = device if time else jnp.int32(0)
            return attention_blocks.attend(query, key, value, own, others, part, scope)

        of_query = P("batch", split, axis if heads else None, None)
        of_key = P("batch", None, axis if keys_too else None, None)
        of_kernel = P() if kernel is None else attention_splash.kernel_spec(kernel, mesh, split)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(of_kernel, of_query, of_key, of_key, P("batch", split), P("batch", None)),
            out_specs=of_query,
            # Its gradient is written by hand, and JAX sums what all devices have of the keys'.
            check_vma=False,
        )(kernel, query, key, value, segments, segments)

    def _kernel(self, query: jax.Array, scope: Scope, head_parts: int) -> Any:
        """Return the TPU's kernel of a pass, or None where there is no TPU or the kernel cannot express it."""
        mesh = self._activations.mesh
        _, length, heads, head = query.shape
        if mesh is None or mesh.devices.flat[0].platform != "tpu":
            return None
        if not attention_splash.expresses(scope, length // scope.parts, head, query.dtype):
            return None
        return attention_splash.kernel(scope, length, heads // head_parts)


def groups_of(key: jax.Array, device: jax.Array, heads: int, ratio: int) -> jax.Array:
    """Return the groups that a device's heads share, of all of them.

    Args:
        key: (batch, keys, groups, head), or values.
        device: int32 (), its number; each has as many heads.
        heads: of queries that it has.
        ratio: heads of queries that share a group.

    Returns:
        (batch, keys, n, head); where the heads do not make whole groups or lie in one, one for each head.
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
