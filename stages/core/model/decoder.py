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

from stages.core.model import kv_cache, layer_embeddings
from stages.core.model.activations import UNCONSTRAINED, Activations
from stages.core.model.attention import Attend, SelfAttention
from stages.core.model.gated import gated
from stages.core.model.kv_cache import Cache
from stages.core.model.lora import Dropout
from stages.core.model.rotary import Rotary
from stages.core.model.tensor_parallel import Projections
from stages.core.presets.architecture import of_backbone
from stages.core.presets.layer_kinds import LayerKind

# One device: nothing is split.
SINGLE = Projections()
# Keys and values of a block (batch, length, key/value heads, head).
Keys = tuple[jax.Array, jax.Array]


class _Block(NamedTuple):
    """A block: its number, keras-hub's layer, and its kind."""

    number: int
    layer: Any
    kind: LayerKind


@dataclass(frozen=True)
class _Pass:
    """What all blocks of one forward pass share.

    Attributes:
        parts: what each block adds of its own (`layer_embeddings`), by its number; empty where the model has nothing.
        others: the numbers of the blocks whose keys and values others attend to.
        counted: bool (batch, length), the tokens that `sent` counts.
        sent: how many of them each expert of each block so far got.
    """

    blocks: list[_Block]
    x: jax.Array
    parts: list[jax.Array]
    others: frozenset[int]
    constrain: Activations
    projections: Projections
    rotary: Rotary
    dropout: Dropout | None
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
    layer_rows: jax.Array | None = None,
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
        layer_rows: from `layer_embeddings.look_up`.
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
    run = _begin(backbone, token_embeddings, layer_rows, positions, segment_ids > 0, constrain, projections, dropout)
    x = run.x
    held: dict[int, Keys] = {}
    for each in run.blocks:

        def block(
            x: jax.Array, taken: Keys | None, each: _Block = each
        ) -> tuple[jax.Array, Keys | None, list[jax.Array]]:
            own = replace(run, sent=[])
            attend = attention.of_block(each.number, each.kind, _soft_cap(each))
            x, keys = _block(own, each, x, attend, taken)
            return x, keys if each.number in run.others else None, own.sent

        if before_block:
            before_block(each.layer)
        taken = None if each.kind.keys_of is None else held[each.kind.keys_of]
        x, keys, found = jax.checkpoint(block)(x, taken) if rematerialize else block(x, taken)
        if keys is not None:
            held[each.number] = keys
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
    layer_rows: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Return the hidden state of each prompt's last token, and the caches to continue from.

    Args:
        backbone: a GemmaBackbone or Gemma3Backbone.
        token_embeddings: (batch, width, hidden), not yet scaled; each prompt is at the end of its row, after padding,
            so that all rows have their next token at one place.
        lengths: int32 (batch,), the tokens of each prompt, 1 to `width`.
        capacity: tokens that a row can have, padding included.
        constrain: sets the sharding of activations.
        layer_rows: from `layer_embeddings.look_up`.

    Returns:
        (batch, hidden), and a cache for each block with keys of its own, which come first, in the compute dtype, with
        as many places as the capacity, or as the sliding window where that is smaller. A row's padding counts among its
        tokens.
    """
    width = token_embeddings.shape[1]
    places = np.arange(width, dtype=np.int32)[None, :]
    padding = (width - lengths)[:, None]
    attention = SelfAttention((places >= padding).astype(jnp.int32), constrain)
    run = _begin(backbone, token_embeddings, layer_rows, places - padding, places >= padding, constrain, projections)
    x = run.x
    caches: list[Cache] = []
    held: list[Keys] = []
    for number, kind in ((each.number, each.kind) for each in run.blocks):
        attend = attention.of_block(number, kind, _soft_cap(run.blocks[number]))
        x, keys = _block(run, run.blocks[number], x, attend, None if kind.keys_of is None else held[kind.keys_of])
        held.append(keys)
        if kind.keys_of is None:
            size = capacity if kind.window is None else min(capacity, kind.window)
            caches.append((kv_cache.latest(keys[0], size), kv_cache.latest(keys[1], size)))
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
    layer_rows: jax.Array | None = None,
) -> tuple[jax.Array, list[Keys]]:
    """Return the hidden states of one new token a row, and its key and value for each cache, to be added to it.

    Args:
        backbone: a GemmaBackbone or Gemma3Backbone.
        token_embeddings: (batch, 1, hidden), not yet scaled.
        place: int32 (), how many tokens each row has before this one, padding included.
        padding: int32 (batch,), how many of them are padding.
        caches: as `read_prompts` returns them.
        constrain: sets the sharding of activations.
        layer_rows: from `layer_embeddings.look_up`.

    Returns:
        (batch, hidden), and a pair of (batch, 1, key/value heads, head) a cache.
    """
    positions = (place - padding)[:, None]
    run = _begin(backbone, token_embeddings, layer_rows, positions, positions >= 0, constrain, projections)
    x = run.x
    found: list[Keys] = []
    for each in run.blocks:
        source = each.number if each.kind.keys_of is None else each.kind.keys_of
        cache = caches[source]
        mask = kv_cache.before(cache[0].shape[2], place, padding)

        def attend(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            layer: Any = each.layer,
            cache: Cache = cache,
            mask: jax.Array = mask,
        ) -> jax.Array:
            return kv_cache.attend(query, key, value, cache, mask, layer.attention.logit_soft_cap)

        x, keys = _block(run, each, x, attend, None if each.kind.keys_of is None else found[source])
        if each.kind.keys_of is None:
            found.append(keys)
    return _norm(backbone.layer_norm, x[:, 0]), found


def _begin(
    backbone: keras.Model,
    token_embeddings: jax.Array,
    layer_rows: jax.Array | None,
    positions: jax.Array,
    counted: jax.Array,
    constrain: Activations,
    projections: Projections,
    dropout: Dropout | None = None,
) -> _Pass:
    """Return what the blocks of a pass over tokens at these positions (batch or 1, length) share, and what they begin
    with, the scaled embeddings.

    Raises:
        ValueError: the blocks add something of their own, and there are no `layer_rows`.
    """
    architecture = of_backbone(backbone)
    x = _scale(backbone, token_embeddings)
    parts: list[jax.Array] = []
    if architecture.kinds[0].layer_input:
        if layer_rows is None:
            raise ValueError("a model with embeddings for each block takes the rows that the tokens have there")
        parts = layer_embeddings.inputs(backbone, x, layer_rows, constrain, projections)
    others = frozenset(kind.keys_of for kind in architecture.kinds if kind.keys_of is not None)
    pairs = zip(backbone.transformer_layers, architecture.kinds, strict=True)
    blocks = [_Block(number, *pair) for number, pair in enumerate(pairs)]
    rotary = Rotary(architecture.kinds, positions)
    return _Pass(blocks, x, parts, others, constrain, projections, rotary, dropout, counted)


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


def _block(run: _Pass, block: _Block, x: jax.Array, attend: Attend, taken: Keys | None) -> tuple[jax.Array, Keys]:
    """One decoder block: attention and feed-forward, each with its norms and residual.

    Args:
        run: what all blocks share.
        block: which.
        x: its input (batch, length, hidden).
        attend: what each query attends to.
        taken: another block's keys and values, where it attends to these.

    Returns:
        Its output, and the keys and values that it attended to.
    """
    layer, kind = block.layer, block.kind
    h = _norm(layer.pre_attention_norm, x)
    h, keys = _attention(run, block, h, attend, taken)
    if kind.post_attention_norm:
        h = _norm(layer.post_attention_norm, h)
    x = x + h
    h = _norm(layer.pre_ffw_norm, x)
    gate, up = run.projections.columns([layer.gating_ffw, layer.gating_ffw_2], h, run.dropout)
    h = run.constrain(run.projections.rows(layer.ffw_linear, gated(gate, up), run.dropout), "hidden")
    if kind.experts:
        mixed, sent = run.projections.experts(layer, kind.experts, x, _norm(layer.pre_ffw_norm_moe, x), run.counted)
        h = _norm(layer.post_ffw_norm_dense, h) + _norm(layer.post_ffw_norm_moe_path, run.constrain(mixed, "hidden"))
        run.sent.append(sent)
    if kind.post_ffw_norm:
        h = _norm(layer.post_ffw_norm, h)
    x = x + h
    if run.parts:
        part = run.parts[block.number]
        x = layer_embeddings.add(layer, x, part, run.constrain, run.projections, run.dropout)
    return (x * layer.layer_scalar.value.astype(x.dtype) if kind.scaled else x), keys


def _attention(run: _Pass, block: _Block, x: jax.Array, attend: Attend, taken: Keys | None) -> tuple[jax.Array, Keys]:
    """Grouped-query attention: (batch, length, hidden) to the same, and the keys and values."""
    attention, kind = block.layer.attention, block.kind

    def held(array: jax.Array, role: str) -> jax.Array:
        return run.constrain(array, role, block.number)

    layers = [attention.query_dense] + ([] if taken else [attention.key_dense])
    layers += [] if taken or kind.keys_are_values else [attention.value_dense]
    query, *own = run.projections.columns(layers, x, run.dropout)
    query = held(query, "query")
    if kind.query_key_norm:
        query = _norm(attention.query_norm, query)
    # Constrain again after RoPE so that the backward pass reuses the gathered keys; XLA would gather them again.
    query = held(run.rotary(kind, query), "query")
    if kind.query_scale != 1.0:
        query = query * jnp.asarray(kind.query_scale, query.dtype)
    key, value = taken or _keys(run, block, [held(each, "key") for each in own])
    mixed = held(held(attend(query, key, value), "query"), "mixed")
    return run.constrain(run.projections.rows(attention.output_dense, mixed, run.dropout), "hidden"), (key, value)


def _keys(run: _Pass, block: _Block, projected: list[jax.Array]) -> Keys:
    """Return a block's keys, normalised and turned, and its values, from what the projections gave: one or both."""
    attention, kind = block.layer.attention, block.kind
    key, value = projected[0], projected[-1]
    if kind.query_key_norm:
        key = _norm(attention.key_norm, key)
    if kind.value_norm:
        value = _norm(attention.value_norm, value)
    return run.constrain(run.rotary(kind, key), "key", block.number), value
