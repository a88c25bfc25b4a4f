"""Products of rows that are sorted by expert, tile by tile: for GPUs, where XLA has no kernel for ragged rows, and the
gradient of the experts' matrices on TPUs, for which there is none either.

Purpose: there `jax.lax.ragged_dot` (jax 0.10.2) becomes one product of all rows with all experts, masked: as many times
the work and the memory as there are experts. Compiled for an H100, one product of Gemma 4 26B-A4B over 4,096 tokens
takes 22 GiB of temporaries so, and 0.2 GiB here; the gradient on a v6e 45 ms by the compiler's cycles, and 13 ms here.

The rows of each expert are divided into tiles. A tile reads rows beside its own where these do not fill it, and writes
its own alone. At most rows / tile + experts tiles are multiplied, each by one matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TILE = 128
"""Rows of a tile: what a GPU's matrix units take well, and few beside the rows that an expert is sent in a step."""


class _Tiles(NamedTuple):
    """Of each tile its expert, the row where it begins, and that where its expert's rows end; int32 (tiles,)."""

    expert: jax.Array
    begin: jax.Array
    end: jax.Array

    @classmethod
    def of(cls, rows: int, sizes: jax.Array) -> _Tiles:
        """Return those of sorted rows; the tiles that are not needed begin after the last row."""
        # Each expert that was sent a row has at most one tile that is not full.
        number = jnp.arange(rows // TILE + min(rows, sizes.shape[0]))
        count = -(-sizes // TILE)
        last = jnp.cumsum(count)
        expert = jnp.minimum(jnp.sum(number[:, None] >= last, axis=1), sizes.shape[0] - 1)
        ends = jnp.cumsum(sizes)
        begin = (ends - sizes)[expert] + (number - (last - count)[expert]) * TILE
        begin = jnp.where(number < last[-1], begin, rows)
        return cls(*(each.astype(jnp.int32) for each in (expert, begin, ends[expert])))

    def within(self, rows: int) -> tuple[jax.Array, int, jax.Array]:
        """Return where a single tile is read and written, how many rows, and which of them are its own (size, 1)."""
        size = min(TILE, rows)
        place = jnp.minimum(self.begin, rows - size)
        row = place + jnp.arange(size)
        return place, size, ((row >= self.begin) & (row < self.end))[:, None]


def times(x: jax.Array, w: jax.Array, sizes: jax.Array, precision: Any, *, transposed: bool = False) -> jax.Array:
    """Multiply rows, each with the matrix of its expert, or with that transposed.

    Args:
        x: (rows, inputs), sorted by expert, in the compute dtype.
        w: (experts, inputs, outputs), or (experts, outputs, inputs) if transposed; floats or int8 codes.
        sizes: int32 (experts,), rows of each.
        precision: of the products.

    Returns:
        (rows, outputs) in the compute dtype; zero in rows of no expert.
    """
    rows, equation = x.shape[0], "rn,mn->rm" if transposed else "rn,nm->rm"

    def one(y: jax.Array, tile: _Tiles) -> tuple[jax.Array, None]:
        place, size, own = tile.within(rows)
        part, before = (jax.lax.dynamic_slice_in_dim(each, place, size) for each in (x, y))
        # One expert's matrix at a time in the compute dtype.
        part = jnp.einsum(equation, part, w[tile.expert].astype(x.dtype), precision=precision)
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(own, part, before), place, 0), None

    begin = _zeros((rows, w.shape[1] if transposed else w.shape[2]), x.dtype, sizes)
    return jax.lax.scan(one, begin, _Tiles.of(rows, sizes))[0]


def gradient_of_matrices(x: jax.Array, gradient: jax.Array, sizes: jax.Array, precision: Any, dtype: Any) -> jax.Array:
    """Return the gradients of the matrices of `times`, each summed over the rows of its expert.

    Args:
        x: (rows, inputs), sorted by expert.
        gradient: of the products, (rows, outputs).
        sizes: int32 (experts,), rows of each.
        precision: of the products.
        dtype: in which they are summed.

    Returns:
        (experts, inputs, outputs) in `dtype`.
    """

    def one(sums: jax.Array, tile: _Tiles) -> tuple[jax.Array, None]:
        place, size, own = tile.within(x.shape[0])
        rows, of_rows = (jax.lax.dynamic_slice_in_dim(each, place, size) for each in (x, gradient))
        # Both, since what is not of this expert need not be finite.
        rows, of_rows = (jnp.where(own, each, jnp.zeros((), each.dtype)) for each in (rows, of_rows))
        part = jnp.einsum("rn,rm->nm", rows, of_rows, precision=precision, preferred_element_type=dtype)
        return sums.at[tile.expert].add(part), None

    begin = _zeros((sizes.shape[0], x.shape[1], gradient.shape[1]), dtype, sizes)
    return jax.lax.scan(one, begin, _Tiles.of(x.shape[0], sizes))[0]


def _zeros(shape: tuple[int, ...], dtype: Any, sizes: jax.Array) -> jax.Array:
    """Return zeros that are made where the sizes are known, and as much of one device as they are.

    XLA for GPUs makes all zeros of a program at its beginning, together: those of every block's products would be kept
    until these are computed, 0.9 GiB per recomputed block of Gemma 4 26B-A4B.
    """
    return jnp.broadcast_to((sizes[0] < 0).astype(dtype), shape)
