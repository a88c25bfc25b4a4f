"""Gemma's forward pass over keras-hub's own layers and weights.

Purpose: keras-hub's backbones take no attention mask, so reviews packed into one sequence would see each other; they
form the full kernel W + AB for LoRA; and a block with a sliding window keeps every token in its cache. This module
calls the same layers in the same order with the three added. It is the only place that knows keras-hub's attribute
names inside a block, and `tests/model/test_decoder.py` holds it to the backbones' own output for every family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

from stages.core.model import kv_cache
from stages.core.model.activations import UNCONSTRAINED, Activations
from stages.core.model.attention import Attend, SelfAttention
from stages.core.model.kv_cache import Cache
from stages.core.model.lora import Dropout
from stages.core.model.rotary import Rotary
from stages.core.model.tensor_parallel import Projections
from stages.core.presets.architecture import of_backbone
from stages.core.presets.layer_kinds import LayerKind

# One device: nothing is split.
SINGLE = Projections()


class _Block(NamedTuple):
    """A block: its number, keras-hub's layer, and its kind."""

    number: int
    layer: Any
    kind: LayerKind


@dataclass(frozen=True)
class _Pass:
    """What all blocks of one forward pass share."""

    blocks: list[_Block]
    constrain: Activations
    projections: Projections
    rotary: Rotary
    dropout: Dropout | None
    # How many of the counted tokens, bool (batch, length), the experts of each block so far were sent.
    counted: jax.Array
    sent: list[jax.Array] = field(default_factory=list)


def hidden_states(
    backbone: keras.Model,
    token_embeddings: jax.Array,
    segment_ids: jax.Array,
    *,
    constrain: Activations = UNCONSTRAINED,
    projections: Projections = SINGLE,
    dropout: Dropout | None = None,
    rematerialize: bool = False,
    before_block: Callable[[Any], None] | None = None,
    sent: list[jax.Array] | None = None,
) -> jax.Array:
    """Return the final normalised hidden states.

    Args:
        backbone: a GemmaBackbone or Gemma3Backbone.
        token_embeddings: (batch, length, hidden), rows of the embedding table, not yet scaled.
        segment_ids: int32 (batch, length), not negative; a token sees those of its own segment up to itself. Rotary
            embeddings only see differences of positions within a segment, so packed segments need no positions of
            their own.
        constrain: sets the sharding of activations.
        dropout: applied to what goes into an adapter.
        rematerialize: recompute each block in the backward pass instead of keeping its activations.
        before_block: called with each block's layer before it runs, outside of a compiled function: it can give the
            layer its weights, so that those of one block are in memory.
        sent: takes, block by block, how many tokens each of its experts was sent, padding not counted, int32
            (experts,).

    Returns:
        (batch, length, hidden) in the compute dtype.
    """
    attention = SelfAttention(segment_ids, constrain)
    positions = np.arange(segment_ids.shape[1], dtype=np.int32)[None, :]
    run = _begin(backbone, positions, segment_ids > 0, constrain, projections, dropout)
    x = _scale(backbone, token_embeddings)
    for each in run.blocks:

        def block(x: jax.Array, each: _Block = each) -> tuple[jax.Array, list[jax.Array]]:
            own = replace(run, sent=[])
            return _block(own, each, x, attention.of_block(each.number, each.kind, _soft_cap(each))), own.sent

        if before_block:
            before_block(each.layer)
        x, found = jax.checkpoint(block)(x) if rematerialize else block(x)
        if sent is not None:
            sent += found
    return _norm(backbone.layer_norm, x)


def read_prompts(
    backbone: keras.Model,
    token_embeddings: jax.Array,
    lengths: jax.Array,
    capacity: int,
    *,
    constrain: Activations = UNCONSTRAINED,
    projections: Projections = SINGLE,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Return the hidden state of each prompt's last token, and the caches to continue from.

    Args:
        backbone: a GemmaBackbone or Gemma3Backbone.
        token_embeddings: (batch, width, hidden), not yet scaled; each prompt is at the end of its row, after padding,
            so that all rows have their next token at one place.
        lengths: int32 (batch,), the tokens of each prompt, 1 to `width`.
        capacity: tokens that a row can have, padding included.
        constrain: sets the sharding of activations.

    Returns:
        (batch, hidden), and a cache per block, in the compute dtype, with as many places as the capacity, or as the
        sliding window where that is smaller. A row's padding counts among its tokens.
    """
    width = token_embeddings.shape[1]
    places = np.arange(width, dtype=np.int32)[None, :]
    padding = (width - lengths)[:, None]
    attention = SelfAttention((places >= padding).astype(jnp.int32), constrain)
    run = _begin(backbone, places - padding, places >= padding, constrain, projections)
    x = _scale(backbone, token_embeddings)
    caches: list[Cache] = []
    for each in run.blocks:
        mix = attention.of_block(each.number, each.kind, _soft_cap(each))

        def attend(
            query: jax.Array, key: jax.Array, value: jax.Array, kind: LayerKind = each.kind, mix: Attend = mix
        ) -> jax.Array:
            size = capacity if kind.window is None else min(capacity, kind.window)
            caches.append((kv_cache.latest(key, size), kv_cache.latest(value, size)))
            return mix(query, key, value)

        x = _block(run, each, x, attend)
    return _norm(backbone.layer_norm, x[:, -1]), tuple(caches)


def read_token(
    backbone: keras.Model,
    token_embeddings: jax.Array,
    place: jax.Array,
    padding: jax.Array,
    caches: tuple[Cache, ...],
    *,
    constrain: Activations = UNCONSTRAINED,
    projections: Projections = SINGLE,
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Return the hidden states of one new token a row, and its key and value in each block, to be added to the cache.

    Args:
        backbone: a GemmaBackbone or Gemma3Backbone.
        token_embeddings: (batch, 1, hidden), not yet scaled.
        place: int32 (), how many tokens each row has before this one, padding included.
        padding: int32 (batch,), how many of them are padding.
        caches: as `read_prompts` returns them.
        constrain: sets the sharding of activations.

    Returns:
        (batch, hidden), and a pair of (batch, 1, key/value heads, head) a block.
    """
    positions = (place - padding)[:, None]
    run = _begin(backbone, positions, positions >= 0, constrain, projections)
    x = _scale(backbone, token_embeddings)
    found: list[tuple[jax.Array, jax.Array]] = []
    for each, cache in zip(run.blocks, caches, strict=True):
        mask = kv_cache.before(cache[0].shape[2], place, padding)

        def attend(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            layer: Any = each.layer,
            cache: Cache = cache,
            mask: jax.Array = mask,
        ) -> jax.Array:
            found.append((key, value))
            return kv_cache.attend(query, key, value, cache, mask, layer.attention.logit_soft_cap)

        x = _block(run, each, x, attend)
    return _norm(backbone.layer_norm, x[:, 0]), found


def _begin(
    backbone: keras.Model,
    positions: jax.Array,
    counted: jax.Array,
    constrain: Activations,
    projections: Projections,
    dropout: Dropout | None = None,
) -> _Pass:
    """Return what the blocks of a pass over tokens at these positions (batch or 1, length) share."""
    architecture = of_backbone(backbone)
    pairs = zip(backbone.transformer_layers, architecture.kinds, strict=True)
    blocks = [_Block(number, *pair) for number, pair in enumerate(pairs)]
    rotary = Rotary(architecture.kinds, positions, interleaved=architecture.family.interleaved)
    return _Pass(blocks, constrain, projections, rotary, dropout, counted)


def _soft_cap(block: _Block) -> float | None:
    """Return the soft cap of a block's logits, or None."""
    cap: float | None = block.layer.attention.logit_soft_cap
    return cap


def _scale(backbone: keras.Model, token_embeddings: jax.Array) -> jax.Array:
    """Multiply by the square root of the hidden size, rounded to the compute dtype as keras-hub does."""
    return token_embeddings * jnp.asarray(backbone.hidden_dim**0.5, token_embeddings.dtype)


def _norm(layer: Any, x: jax.Array) -> jax.Array:
    """Normalise in float32, to the compute dtype.

    Called as a layer, Keras would round the scale to the compute dtype first, and on the way back each batch's part of
    its gradient.
    """
    return layer.call(x)


def _block(run: _Pass, block: _Block, x: jax.Array, attend: Attend) -> jax.Array:
    """One decoder block: attention and feed-forward, each with its norms and residual."""
    layer, kind = block.layer, block.kind
    h = _norm(layer.pre_attention_norm, x)
    h = _attention(run, block, h, attend)
    if kind.post_attention_norm:
        h = _norm(layer.post_attention_norm, h)
    x = x + h
    h = _norm(layer.pre_ffw_norm, x)
    gate, up = run.projections.columns([layer.gating_ffw, layer.gating_ffw_2], h, run.dropout)
    h = run.constrain(
        run.projections.rows(layer.ffw_linear, jax.nn.gelu(gate, approximate=True) * up, run.dropout), "hidden"
    )
    if kind.experts:
        mixed, sent = run.projections.experts(layer, kind.experts, x, _norm(layer.pre_ffw_norm_moe, x), run.counted)
        h = _norm(layer.post_ffw_norm_dense, h) + _norm(layer.post_ffw_norm_moe_path, run.constrain(mixed, "hidden"))
        run.sent.append(sent)
    if kind.post_ffw_norm:
        h = _norm(layer.post_ffw_norm, h)
    x = x + h
    return x * layer.layer_scalar.value.astype(x.dtype) if kind.scaled else x


def _attention(run: _Pass, block: _Block, x: jax.Array, attend: Attend) -> jax.Array:
    """Grouped-query attention: (batch, length, hidden) to the same."""
    attention, kind = block.layer.attention, block.kind

    def held(array: jax.Array, role: str) -> jax.Array:
        return run.constrain(array, role, block.number)

    layers = [attention.query_dense, attention.key_dense]
    layers += [] if kind.keys_are_values else [attention.value_dense]
    query, key, *own = run.projections.columns(layers, x, run.dropout)
    query, key = held(query, "query"), held(key, "key")
    value = held(own[0], "key") if own else key
    if kind.query_key_norm:
        query = _norm(attention.query_norm, query)
        key = _norm(attention.key_norm, key)
    if kind.value_norm:
        value = _norm(attention.value_norm, value)
    # Constrain again after RoPE so that the backward pass reuses the gathered keys; XLA would gather them again.
    query = held(run.rotary(kind, query), "query")
    key = held(run.rotary(kind, key), "key")
    if kind.query_scale != 1.0:
        query = query * jnp.asarray(kind.query_scale, query.dtype)
    mixed = held(held(attend(query, key, value), "query"), "mixed")
    return run.constrain(run.projections.rows(attention.output_dense, mixed, run.dropout), "hidden")
