"""What Gemma 4's small sizes add in each block: a token's own numbers for that block (per-layer embeddings).

    p = ( norm( (x0 Wm) D^-0.5, the P numbers of each block apart ) + table[ids] P^0.5 ) 2^-0.5
    x = x + norm( (gelu(x Wg) * p_i) Wu )                                  last in block i

x0 are the scaled token embeddings, D the hidden size. The table (vocabulary, blocks x P) has half of E2B's parameters
and is looked up, never multiplied: each device holds its rows, as of the token table. Source: transformers 5.23,
`modeling_gemma4.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import keras

from stages.core.model import tied_table
from stages.core.model.activations import Activations
from stages.core.model.lora import Dropout
from stages.core.model.tensor_parallel import Projections
from stages.core.sharding.keras_internals import layer_table


def look_up(backbone: keras.Model, token_ids: jax.Array, plan: tied_table.HeadPlan) -> jax.Array | None:
    """Return the table's rows of tokens, or None where the model has no such table.

    Args:
        backbone: a Gemma's, with its weights.
        token_ids: int32 (batch, length).
        plan: the head's; its `of_blocks` says where the table lies.

    Returns:
        (batch, length, blocks x P) in the compute dtype, split over time where hidden states are.
    """
    layer = layer_table(backbone)
    if layer is None or plan.of_blocks is None:
        return None
    return tied_table.embed(tied_table.rows_of(layer), token_ids, plan.of_blocks, layer.compute_dtype)


def inputs(
    backbone: keras.Model, x: jax.Array, rows: jax.Array, constrain: Activations, projections: Projections
) -> list[jax.Array]:
    """Return p of each block, (batch, length, P).

    Args:
        backbone: as for `look_up`.
        x: the scaled token embeddings (batch, length, hidden).
        rows: from `look_up`.
        constrain: sets the sharding of activations.
        projections: applies layers as they are split.
    """
    blocks, size = backbone.num_layers, backbone.hidden_size_per_layer_input
    (own,) = projections.columns([backbone.per_layer_model_projection], x)
    # From each device's columns of all positions to all columns of its positions.
    own = constrain(own, "hidden") * jnp.asarray(backbone.hidden_dim**-0.5, x.dtype)
    shape = (*own.shape[:2], blocks, size)
    own = _norm(backbone.per_layer_projection_norm, own.reshape(shape))
    rows = rows.reshape(shape) * jnp.asarray(size**0.5, rows.dtype)
    both = (own + rows) * jnp.asarray(2.0**-0.5, own.dtype)
    # The gradient of a split is one array again; of slices, it would be a sum of as many arrays as there are blocks.
    return [part[:, :, 0] for part in jnp.split(both, blocks, axis=2)]


def add(
    layer: Any, x: jax.Array, part: jax.Array, constrain: Activations, projections: Projections, dropout: Dropout | None
) -> jax.Array:
    """Return a block's hidden states (batch, length, hidden) with what its own numbers of the tokens add to them.

    The kernels are small beside the hidden states of many tokens, so that where these are split over time each device
    takes the whole kernels for its own positions, and no hidden state is sent.

    Args:
        layer: keras-hub's block.
        x: its hidden states.
        part: its p, from `inputs`.
        constrain: as for `inputs`.
        projections: as for `inputs`.
        dropout: applied to what goes into an adapter.
    """
    if projections.splits_time(x):
        gate = projections.apart(layer.per_layer_input_gate, x, dropout)
        added = projections.apart(layer.per_layer_up_proj, jax.nn.gelu(gate, approximate=True) * part, dropout)
    else:
        (gate,) = projections.columns([layer.per_layer_input_gate], x, dropout)
        added = projections.rows(layer.per_layer_up_proj, jax.nn.gelu(gate, approximate=True) * part, dropout)
    return x + _norm(layer.post_per_layer_input_norm, constrain(added, "hidden"))


def _norm(layer: Any, x: jax.Array) -> jax.Array:
    """Normalise in float32, to the compute dtype, as `decoder.py` does."""
    return layer.call(x)
