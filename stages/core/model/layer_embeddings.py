"""What Gemma 4's small sizes add in each block: a token's own numbers for that block (per-layer embeddings).

    p = ( norm( (x0 Wm) D^-0.5, the P numbers of each block apart ) + table[ids] P^0.5 ) 2^-0.5
    x = x + norm( (gelu(x Wg) * p_i) Wu )                                  last in block i

x0 are the scaled token embeddings, D the hidden size. The table (vocabulary, blocks x P) has half of E2B's parameters
and is looked up, never multiplied: each device holds its rows of it, as of the token table. Source: transformers 5.23,
`modeling_gemma4.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.sharding import PartitionSpec as P

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
        plan: the head's; its `of_blocks` has the table's sharding.

    Returns:
        (batch, length, blocks x P) in the compute dtype, split over time where hidden states are.
    """
    layer, plan_of_table = layer_table(backbone), plan.of_blocks
    if layer is None or plan_of_table is None:
        return None
    table, dtype = tied_table.rows_of(layer), layer.compute_dtype
    if plan_of_table.gathered_dimension == 0 and not isinstance(table, tied_table.Codes):
        # The fewer rows travel: those of the tokens, or those that a device's part of the model axis has.
        parts = 1 if plan_of_table.mesh is None else plan_of_table.mesh.shape[plan_of_table.vocabulary_axis]
        if token_ids.size < table.shape[0] // parts:
            return _from_everywhere(table, token_ids, plan_of_table, dtype)
    return tied_table.embed(table, token_ids, plan_of_table, dtype)


def _from_everywhere(table: jax.Array, token_ids: jax.Array, plan: tied_table.HeadPlan, dtype: Any) -> jax.Array:
    """Return rows of a table of which each device has its own: the ids go to all, the rows to where the tokens are."""
    batch, model = plan.batch_axis, plan.vocabulary_axis
    split_time = tied_table.splits_time(token_ids.shape[1], plan)

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        ids = jax.lax.all_gather(ids, batch, axis=0, tiled=True)
        device = jax.lax.axis_index(model) * jax.lax.axis_size(batch) + jax.lax.axis_index(batch)
        # Of the parts all but one are zero: their sum is exact in any dtype.
        rows = tied_table.lookup(table, ids - device * table.shape[0], dtype).astype(dtype)
        rows = jax.lax.psum_scatter(rows, batch, scatter_dimension=0, tiled=True)
        return tied_table.sum_parts(rows, split_time, plan)

    return jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(plan.kept, P(batch, None)),
        out_specs=P(batch, model if split_time else None, None),
    )(table, token_ids)


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
