"""The embedding table at both ends of the model: lookup and logits, over a table whose rows a mesh may split.

Gemma's output head is the table of its token embeddings. Every device holds and uses its own rows, so the table is
never gathered. Where the axis does not divide the rows, rows of zeros are added at the end: no word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import keras
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core.model.products import few_rows_transposed, gathered
from stages.core.sharding.keras_internals import table_within

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
    `of_blocks`: the same of the table that has numbers of each token for each block, if the model has one.
    """

    soft_cap: float | None
    mesh: Mesh | None = None
    batch_axis: str = "batch"
    vocabulary_axis: str = "model"
    table_is_trained: bool = False
    block_rows: int = BLOCK_ROWS
    most_tokens: int = MOST_TOKENS
    gathered_dimension: int | None = None
    of_blocks: HeadPlan | None = None

    @property
    def kept(self) -> P:
        """How the table is split where it is kept."""
        axes = [(self.vocabulary_axis,), ()]
        if self.gathered_dimension is not None:
            axes[self.gathered_dimension] += (self.batch_axis,)
        return P(*(each[0] if len(each) == 1 else each or None for each in axes))


class Codes(NamedTuple):
    """A table of int8 codes (vocabulary, hidden) with a float32 scale for each row (vocabulary, 1); frozen.

    It takes a table's place everywhere; what is read of it is made of the codes then, some rows at a time.
    """

    codes: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the table."""
        return self.codes.shape

    def rows(self, dtype: Any) -> jax.Array:
        """Return the table's values."""
        return (self.codes.astype(jnp.float32) * self.scale).astype(dtype)


Table: TypeAlias = jax.Array | Codes


def table_of(backbone: keras.Model) -> Table:
    """Return the table of a backbone, in the dtype that it is kept in."""
    return rows_of(backbone.token_embedding)


def rows_of(layer: Any) -> Table:
    """Return the table of a layer of embeddings, in the dtype that it is kept in."""
    table = table_within(layer)
    return Codes(table.value, layer.embeddings_scale.value) if table.dtype == "int8" else table.value


def cast(table: Table, dtype: Any) -> Table:
    """Return the table in the compute dtype; codes stay, until they are read."""
    return table if isinstance(table, Codes) else table.astype(dtype)


def whole(table: Table, hidden: jax.Array, plan: HeadPlan) -> tuple[Table, jax.Array]:
    """Return the table in the dtype of some hidden states, gathered over the batch axis, and these states.

    The gathering waits for the states. XLA would otherwise take it for the one of the lookup, and keep the result.
    """
    table = cast(table, hidden.dtype)
    if plan.gathered_dimension is None or isinstance(table, Codes):
        return table, hidden
    table, hidden = jax.lax.optimization_barrier((table, hidden))
    return jax.lax.with_sharding_constraint(table, NamedSharding(plan.mesh, P(plan.vocabulary_axis, None))), hidden


def values(table: Table, dtype: Any) -> jax.Array:
    """Return some rows in the compute dtype, which a table that is no codes has already."""
    return table.rows(dtype) if isinstance(table, Codes) else table


def padded(table: Table, plan: HeadPlan) -> Table:
    """Return the table (vocabulary, hidden) padded with rows of zeros until the axis size divides it."""
    missing = 0 if plan.mesh is None else -table.shape[0] % plan.mesh.shape[plan.vocabulary_axis]
    if not missing:
        return table

    # Held as the head splits it, so that no device makes the whole of what it takes a part of.
    def pad(array: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(
            jnp.pad(array, ((0, missing), (0, 0))), NamedSharding(plan.mesh, P(plan.vocabulary_axis, None))
        )

    return jax.tree.map(pad, table)


def logits(hidden: jax.Array, table: Table, vocabulary: int, plan: HeadPlan) -> jax.Array:
    """Return the logits of a few tokens, soft cap and all.

    Args:
        hidden: (tokens, hidden), split over the batch axis.
        table: as `padded` returns it, so that who calls this in a loop pads it once.
        vocabulary: the rows that are words.
        plan: soft cap and mesh.

    Returns:
        float32 (tokens, vocabulary).
    """

    def local(hidden: jax.Array, table: Table) -> jax.Array:
        if isinstance(table, Codes):
            return few_rows_transposed(hidden, table.codes) * table.scale[:, 0]
        return few_rows_transposed(hidden, table)

    if plan.mesh is not None:
        # Written out for each device, so that the product's form suits the rows that a device has.
        rows, words = P(plan.batch_axis, None), P(plan.vocabulary_axis, None)
        local = jax.shard_map(
            local, mesh=plan.mesh, in_specs=(rows, words), out_specs=P(plan.batch_axis, plan.vocabulary_axis)
        )
    z = local(hidden, table)[:, :vocabulary]
    return cap(z, plan.soft_cap)


def embed(table: Table, token_ids: jax.Array, plan: HeadPlan, dtype: Any = None) -> jax.Array:
    """Look up rows of the table: (vocabulary, hidden), int32 (batch, length) to (batch, length, hidden).

    Each device looks up the rows it holds and the parts are summed; left to itself XLA may gather the whole table. On a
    mesh the result is split over time where the axis divides that, as hidden states between blocks are.

    The result is in `dtype`, None: the table's (codes have none). The gradient of a row is a sum over all tokens of
    that word, so a trained table's is in the table's own dtype throughout.
    """
    if dtype is None:
        if isinstance(table, Codes):
            raise RuntimeError("a table of codes has no compute dtype")
        dtype = table.dtype
    if not plan.table_is_trained:
        table = cast(table, dtype)
    if plan.mesh is None:
        return take(table, token_ids, dtype).astype(dtype)
    table = padded(table, plan)
    split_time = splits_time(token_ids.shape[1], plan)

    def local(table: Table, ids: jax.Array) -> jax.Array:
        if plan.gathered_dimension is not None and not isinstance(table, Codes):
            table = gathered(table, plan.gathered_dimension, table.dtype)
        # Of the parts all but one are zero: their sum is exact in any dtype.
        rows = lookup(table, ids - first_row(table, plan), dtype).astype(dtype)
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


def first_row(table: Table, plan: HeadPlan) -> jax.Array | int:
    """The number of the first row that this device holds."""
    return 0 if plan.mesh is None else jax.lax.axis_index(plan.vocabulary_axis) * table.shape[0]


def lookup(table: Table, rows: jax.Array, dtype: Any) -> jax.Array:
    """Rows of the local table; zeros for numbers outside of it. Rows of codes in `dtype`, others as the table's."""
    inside = (rows >= 0) & (rows < table.shape[0])
    found = take(table, jnp.clip(rows, 0, table.shape[0] - 1), dtype)
    return jnp.where(inside[..., None], found, jnp.zeros((), found.dtype))


def take(table: Table, rows: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a table; those of codes in `dtype`."""
    return values(jax.tree.map(lambda each: jnp.take(each, rows, axis=0), table), dtype)


def cap(z: jax.Array, soft_cap: float | None) -> jax.Array:
    """Gemma 2's final-logit soft cap."""
    return z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)


def cap_slope(z: jax.Array, soft_cap: float | None) -> jax.Array:
    """The derivative of the capped logit in the raw one, from the capped one."""
    return jnp.ones_like(z) if soft_cap is None else 1.0 - jnp.square(z / soft_cap)
