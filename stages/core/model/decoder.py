"""Gemma's forward pass over keras-hub's own layers and weights.

Purpose: keras-hub's backbones take no attention mask, so reviews packed into one sequence would see each other; they
form the full kernel W + AB for LoRA; and the sampler needs a cache with a position a row. This module calls the same
layers in the same order with the three added. It is the only place that knows keras-hub's attribute names inside a
block, and `tests/model/test_decoder.py` holds it to the backbones' own output for every family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import keras
import numpy as np

from stages.core.model.lora import Dropout
from stages.core.model.products import product
from stages.core.model.rotary import Rotary
from stages.core.model.tensor_parallel import Projections
from stages.core.presets.architecture import FAMILIES

Cache = tuple[jax.Array, jax.Array]
# Constrains an activation's sharding by its role (see causal_lm.activation_layout).
Constrain = Callable[[jax.Array, str], jax.Array]
# One device: nothing is split.
SINGLE = Projections()


def unconstrained(array: jax.Array, role: str) -> jax.Array:
    """Leave an activation where the compiler puts it."""
    return array


@dataclass(frozen=True)
class _Pass:
    """What all blocks of one forward pass share."""

    backbone: keras.Model
    constrain: Constrain
    projections: Projections
    rotary: Rotary
    dropout: Dropout | None


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


def hidden_states(
    backbone: keras.Model,
    token_embeddings: jax.Array,
    mask: jax.Array,
    *,
    constrain: Constrain = unconstrained,
    projections: Projections = SINGLE,
    dropout: Dropout | None = None,
    rematerialize: bool = False,
    before_block: Callable[[Any], None] | None = None,
) -> jax.Array:
    """Return the final normalised hidden states.

    Args:
        backbone: a GemmaBackbone or Gemma3Backbone.
        token_embeddings: (batch, length, hidden), rows of the embedding table, not yet scaled.
        mask: bool (batch, length, length), see `causal_mask`. Rotary embeddings only see differences of positions
            within a segment, so packed segments need no positions of their own.
        constrain: sets the sharding of activations.
        dropout: applied to what goes into an adapter.
        rematerialize: recompute each block in the backward pass instead of keeping its activations.
        before_block: called with each block's layer before it runs, outside of a compiled function: it can give the
            layer its weights, so that those of one block are in memory.

    Returns:
        (batch, length, hidden) in the compute dtype.
    """
    # A constant with one row for the whole batch: the compiler folds the sliding windows once.
    positions = np.arange(mask.shape[1], dtype=np.int32)[None, :]
    run = _Pass(backbone, constrain, projections, _rotary(backbone, positions), dropout)
    x = _scale(backbone, token_embeddings)
    for layer in backbone.transformer_layers:

        def block(x: jax.Array, layer: Any = layer) -> jax.Array:
            window = _window(layer, positions, positions)
            allowed = mask if window is None else mask & window
            return _block(run, layer, x, positions, allowed, None)[0]

        if before_block:
            before_block(layer)
        x = jax.checkpoint(block)(x) if rematerialize else block(x)
    return _norm(backbone.layer_norm, x)


def hidden_states_cached(
    backbone: keras.Model,
    token_embeddings: jax.Array,
    positions: jax.Array,
    caches: tuple[Cache, ...],
    *,
    constrain: Constrain = unconstrained,
    projections: Projections = SINGLE,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Return the hidden states of new tokens, and the caches with them in.

    Args:
        backbone: a GemmaBackbone or Gemma3Backbone.
        token_embeddings: (batch, new, hidden), not yet scaled.
        positions: int32 (batch, new), the position of each new token in its row; a row attends to all cache entries up
            to its own position, so what a row has beyond that (padding of a shorter prompt) is never seen.
        caches: keys and values (batch, capacity, key/value heads, head) a block.
        constrain: sets the sharding of activations.
    """
    keys_at = jnp.broadcast_to(
        jnp.arange(caches[0][0].shape[1], dtype=jnp.int32), (positions.shape[0], caches[0][0].shape[1])
    )
    causal = keys_at[:, None, :] <= positions[:, :, None]
    run = _Pass(backbone, constrain, projections, _rotary(backbone, positions), None)
    x = _scale(backbone, token_embeddings)
    updated = []
    for layer, cache in zip(backbone.transformer_layers, caches, strict=True):
        window = _window(layer, positions, keys_at)
        allowed = causal if window is None else causal & window
        x, new_cache = _block(run, layer, x, positions, allowed, cache)
        # A block that is given a cache returns one.
        updated.append(cast("Cache", new_cache))
    return _norm(backbone.layer_norm, x), tuple(updated)


def empty_caches(backbone: keras.Model, batch: int, capacity: int) -> tuple[Cache, ...]:
    """Return zeroed caches for `batch` rows of `capacity` tokens, in the compute dtype."""
    shape = (batch, capacity, backbone.num_key_value_heads, backbone.head_dim)
    dtype = backbone.token_embedding.compute_dtype
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in backbone.transformer_layers)


def _scale(backbone: keras.Model, token_embeddings: jax.Array) -> jax.Array:
    """Multiply by the square root of the hidden size, rounded to the compute dtype as keras-hub does."""
    return token_embeddings * jnp.asarray(backbone.hidden_dim**0.5, token_embeddings.dtype)


def _norm(layer: Any, x: jax.Array) -> jax.Array:
    """Normalise in float32, to the compute dtype.

    Called as a layer, Keras would round the scale to the compute dtype first, and on the way back each batch's part of
    its gradient.
    """
    return layer.call(x)


def _rotary(backbone: keras.Model, positions: jax.Array) -> Rotary:
    """Return the rotary embeddings of a pass."""
    layers = [layer.attention.rope_layer for layer in backbone.transformer_layers]
    return Rotary(layers, positions, backbone.head_dim, interleaved=FAMILIES[type(backbone).__name__].interleaved)


def _window(layer: Any, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
    """Return the sliding window (batch, queries, keys), or None for a block that sees everything."""
    attention = layer.attention
    if not attention.use_sliding_window_attention:
        return None
    return queries[:, :, None] - keys[:, None, :] < attention.sliding_window_size


def _block(
    run: _Pass, layer: Any, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: Cache | None
) -> tuple[jax.Array, Cache | None]:
    """One decoder block: attention and feed-forward, each with its norms and residual."""
    h = _norm(layer.pre_attention_norm, x)
    h, cache = _attention(run, layer.attention, h, positions, mask, cache)
    if layer.use_post_attention_norm:
        h = _norm(layer.post_attention_norm, h)
    x = x + h
    h = _norm(layer.pre_ffw_norm, x)
    gate, up = run.projections.columns([layer.gating_ffw, layer.gating_ffw_2], h, run.dropout)
    h = run.constrain(
        run.projections.rows(layer.ffw_linear, jax.nn.gelu(gate, approximate=True) * up, run.dropout), "hidden"
    )
    if layer.use_post_ffw_norm:
        h = _norm(layer.post_ffw_norm, h)
    return x + h, cache


def _attention(
    run: _Pass, attention: Any, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: Cache | None
) -> tuple[jax.Array, Cache | None]:
    """Grouped-query attention: (batch, length, hidden) to the same."""
    layers = [attention.query_dense, attention.key_dense, attention.value_dense]
    query, key, value = run.projections.columns(layers, x, run.dropout)
    query, key, value = run.constrain(query, "query"), run.constrain(key, "key"), run.constrain(value, "key")
    if getattr(attention, "use_query_key_norm", False):
        query = _norm(attention.query_norm, query)
        key = _norm(attention.key_norm, key)
    # Constrain again after RoPE so that the backward pass reuses the gathered keys; XLA would gather them again.
    query = run.constrain(run.rotary(attention.rope_layer, query), "query")
    key = run.constrain(run.rotary(attention.rope_layer, key), "key")
    if cache is not None:
        rows = jnp.arange(x.shape[0])[:, None]
        key = cache[0].at[rows, positions].set(key)
        value = cache[1].at[rows, positions].set(value)
        cache = (key, value)
    # keras-hub 0.32 builds every block with query_head_dim_normalize=True, whatever the backbone's argument says: the
    # 27B models would be scaled by 1/sqrt(128) instead of 1/sqrt(144) (Gemma 2) and 1/sqrt(168) (Gemma 3).
    per_head = (
        run.backbone.head_dim if run.backbone.query_head_dim_normalize else run.backbone.hidden_dim // query.shape[2]
    )
    query = query * jnp.asarray(per_head**-0.5, query.dtype)
    # Logits and their softmax grow with the square of the length, and are soon computed again: they are not kept.
    mixed = jax.checkpoint(_mix, static_argnums=4)(query, key, value, mask, attention.logit_soft_cap)
    mixed = run.constrain(run.constrain(mixed, "query"), "mixed")
    return run.constrain(run.projections.rows(attention.output_dense, mixed, run.dropout), "hidden"), cache


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
