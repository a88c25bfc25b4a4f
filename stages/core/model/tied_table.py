"""The embedding table at both ends of the model: lookup and logits, over a table whose rows a mesh may split.

Gemma's output head is the table of its token embeddings. Every device holds and uses its own rows, so the table is
never gathered. Where the axis does not divide the rows, rows of zeros are added at the end: no word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core.model.products import few_rows_transposed, gathered

# Rows of the table in one matrix product: large enough for full speed on a CPU core's share, small enough that a
# block's logits (tokens x 4096) stay in the cache hierarchy. Measured by tests/benchmarks.
BLOCK_ROWS = 4096
# Tokens that walk the table together. Each walk reads the whole table, so few are wanted; 2,048 keep a TPU's units busy
# for far longer than that takes (v5e: 240 operations a byte), and what the walk holds grows with them.
MOST_TOKENS = 2048


@dataclass(frozen=True)
class HeadPlan:
    """How the head runs. Hashable: it is a static argument of the compiled function.

    `mesh` None: one device. Else tokens are split over `batch_axis` and table rows over `vocabulary_axis`, whatever it
    has devices. The table is kept split over the batch axis too in `gathered_dimension`, if that is not None.
    """

    soft_cap: float | None
    mesh: Mesh | None = None
    batch_axis: str = "batch"
    vocabulary_axis: str = "model"
    table_is_trained: bool = False
    block_rows: int = BLOCK_ROWS
    most_tokens: int = MOST_TOKENS
    gathered_dimension: int | None = None

    @property
    def kept(self) -> P:
        """How the table is split where it is kept."""
        axes = [(self.vocabulary_axis,), ()]
        if self.gathered_dimension is not None:
            axes[self.gathered_dimension] += (self.batch_axis,)
        return P(*(each[0] if len(each) == 1 else each or None for each in axes))


def whole(table: jax.Array, hidden: jax.Array, plan: HeadPlan) -> tuple[jax.Array, jax.Array]:
    """Return the table in the dtype of some hidden states, gathered over the batch axis, and these states.

    The gathering waits for the states. XLA would otherwise take it for the one of the lookup, and keep the result.
    """
    table = table.astype(hidden.dtype)
    if plan.gathered_dimension is None:
        return table, hidden
    table, hidden = jax.lax.optimization_barrier((table, hidden))
    return jax.lax.with_sharding_constraint(table, NamedSharding(plan.mesh, P(plan.vocabulary_axis, None))), hidden


def padded(table: jax.Array, plan: HeadPlan) -> jax.Array:
    """Return the table (vocabulary, hidden) padded with rows of zeros until the axis size divides it."""
    missing = 0 if plan.mesh is None else -table.shape[0] % plan.mesh.shape[plan.vocabulary_axis]
    if not missing:
        return table
    # Held as the head splits it, so that no device makes the whole of what it takes a part of.
    return jax.lax.with_sharding_constraint(
        jnp.pad(table, ((0, missing), (0, 0))), NamedSharding(plan.mesh, P(plan.vocabulary_axis, None))
    )


def logits(hidden: jax.Array, table: jax.Array, vocabulary: int, plan: HeadPlan) -> jax.Array:
    """Return the logits of a few tokens, soft cap and all.

    Args:
        hidden: (tokens, hidden), split over the batch axis.
        table: as `padded` returns it, so that who calls this in a loop pads it once.
        vocabulary: the rows that are words.
        plan: soft cap and mesh.

    Returns:
        float32 (tokens, vocabulary).
    """
    z = few_rows_transposed(hidden, table)
    if plan.mesh is not None:
        split = NamedSharding(plan.mesh, P(plan.batch_axis, plan.vocabulary_axis))
        z = jax.lax.with_sharding_constraint(z, split)[:, :vocabulary]
    return cap(z, plan.soft_cap)


def embed(table: jax.Array, token_ids: jax.Array, plan: HeadPlan, dtype: Any = None) -> jax.Array:
    """Look up rows of the table: (vocabulary, hidden), int32 (batch, length) to (batch, length, hidden).

    Each device looks up the rows it holds and the parts are summed; left to itself XLA may gather the whole table. On a
    mesh the result is split over time where the axis divides that, as hidden states between blocks are.

    The result is in `dtype`, None: the table's. The gradient of a row is a sum over all tokens of that word, so a
    trained table's is in the table's own dtype throughout.
    """
    dtype = dtype or table.dtype
    if not plan.table_is_trained:
        table = table.astype(dtype)
    if plan.mesh is None:
        return jnp.take(table, token_ids, axis=0).astype(dtype)
    table = padded(table, plan)
    split_time = splits_time(token_ids.shape[1], plan)

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        if plan.gathered_dimension is not None:
            table = gathered(table, plan.gathered_dimension, table.dtype)
        # Of the parts all but one are zero: their sum is exact in any dtype.
        rows = lookup(table, ids - first_row(table, plan)).astype(dtype)
        return sum_parts(rows, split_time, plan)

    return jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(plan.kept, P(plan.batch_axis, None)),
        out_specs=P(plan.batch_axis, plan.vocabulary_axis if split_time else None, None),
    )(table, token_ids)


def splits_time(length: int, plan: HeadPlan) -> bool:
    """Whether sums over the vocabulary's parts end up split over time."""
    return plan.mesh is not None and length % plan.mesh.shape[plan.vocabulary_axis] == 0


def sum_parts(parts: jax.Array, split_time: bool, plan: HeadPlan) -> jax.Array:
    """Add the devices' parts (batch, length, hidden); split over time that is half of the traffic."""
    if split_time:
        return jax.lax.psum_scatter(parts, plan.vocabulary_axis, scatter_dimension=1, tiled=True)
    return jax.lax.psum(parts, plan.vocabulary_axis)


def first_row(table: jax.Array, plan: HeadPlan) -> jax.Array | int:
    """The number of the first row that this device holds."""
    return 0 if plan.mesh is None else jax.lax.axis_index(plan.vocabulary_axis) * table.shape[0]


def lookup(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of the local table; zeros for numbers outside of it."""
    inside = (rows >= 0) & (rows < table.shape[0])
    found = jnp.take(table, jnp.clip(rows, 0, table.shape[0] - 1), axis=0)
    return jnp.where(inside[..., None], found, jnp.zeros((), table.dtype))


def cap(z: jax.Array, soft_cap: float | None) -> jax.Array:
    """Gemma 2's final-logit soft cap."""
    return z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)


def cap_slope(z: jax.Array, soft_cap: float | None) -> jax.Array:
    """The derivative of the capped logit in the raw one, from the capped one."""
    return jnp.ones_like(z) if soft_cap is None else 1.0 - jnp.square(z / soft_cap)
