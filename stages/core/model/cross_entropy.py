"""The output head: per-token loss and accuracy from hidden states, without ever storing the logits.

Purpose: Gemma's vocabulary has 256,000 words and more; the logits of one batch of 2 x 128 tokens take 268 MB in
float32, and Keras' loss builds them, their softmax, a one-hot of the same size and their gradients. Here the vocabulary
is walked in blocks with a running maximum and sum of exponentials, and where a gradient will be needed the same pass
accumulates softmax x embedding, as flash attention does with values (https://arxiv.org/abs/2205.14135): loss and
gradient in one pass: two matrix products instead of three.

With a mesh every device walks its own rows of the table and the parts are combined, so the table is never gathered.
Where the axis does not divide the rows, rows of zeros are added at the end: no word, so they take no part in a softmax.

Formulas, for a token with hidden state h, rows e_v and target t (c is the final-logit soft cap, or none):
    z_v = c tanh(h.e_v / c)        loss = log sum_v exp(z_v) - z_t
    dloss/dh = sum_v p_v z'_v e_v - z'_t e_t      with p = softmax(z), z'_v = 1 - (z_v / c)^2
    dloss/de_v = (p_v - [v = t]) z'_v h
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stages.core.model import tied_table
from stages.core.model.tied_table import (
    HeadPlan,
    Table,
    cap,
    cap_slope,
    first_row,
    lookup,
    padded,
    splits_time,
    sum_parts,
    whole,
)


def token_losses(hidden: jax.Array, table: Table, target_ids: jax.Array, plan: HeadPlan) -> tuple[jax.Array, jax.Array]:
    """Return the loss of each token, and whether the target was the most likely token.

    Args:
        hidden: (batch, length, hidden), the final normalised hidden states.
        table: (vocabulary, hidden), the embedding table that is also the output head, as values or int8 codes;
            products take it in the dtype of the hidden states.
        target_ids: int32 (batch, length).
        plan: soft cap, mesh and blocks.

    Returns:
        float32 (batch, length) in nats, and bool (batch, length). The first is differentiable in `hidden`, and in
        `table` if `plan.table_is_trained`: that gradient is summed in float32.
    """
    return _token_losses(hidden, table, target_ids, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_losses(
    hidden: jax.Array, table: Table, target_ids: jax.Array, plan: HeadPlan
) -> tuple[jax.Array, jax.Array]:
    """Do so."""
    rows, hidden = whole(table, hidden, plan)
    rows = padded(rows, plan)
    loss, correct, _, _ = _forward(hidden, rows, target_ids, plan, table.shape[0], with_gradient=False)
    return loss, correct


def _token_losses_forward(
    hidden: jax.Array, table: Table, target_ids: jax.Array, plan: HeadPlan
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    rows, hidden = whole(table, hidden, plan)
    rows = padded(rows, plan)
    loss, correct, log_sum, unit = _forward(hidden, rows, target_ids, plan, table.shape[0], with_gradient=True)
    # A frozen table needs nothing but each token's own gradient for a loss of one.
    rest = (hidden, table, rows, target_ids, log_sum) if plan.table_is_trained else None
    return (loss, correct), (unit, rest)


def _token_losses_backward(plan: HeadPlan, residuals: Any, cotangents: Any) -> tuple[Any, Any, None]:
    unit, rest = residuals
    weights = cotangents[0]
    hidden_gradient = (unit.astype(jnp.float32) * weights[..., None]).astype(unit.dtype)
    if not plan.table_is_trained:
        return hidden_gradient, None, None
    hidden, table, rows, target_ids, log_sum = rest
    gradient = _table_gradient(hidden, rows, target_ids, log_sum, weights, plan)
    # What the rows of zeros get ends here.
    return hidden_gradient, gradient[: table.shape[0]].astype(table.dtype), None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _forward(
    hidden: jax.Array, table: Table, target_ids: jax.Array, plan: HeadPlan, vocabulary: int, *, with_gradient: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Loss, hit, log-sum-exp (batch, length) and the gradient of each token's loss in its hidden state."""
    split_time = plan.mesh is not None and splits_time(target_ids.shape[1], plan)
    piece = functools.partial(
        _piece,
        plan=plan,
        vocabulary=vocabulary if vocabulary < table.shape[0] else None,
        split_time=split_time,
        with_gradient=with_gradient,
    )

    def local(hidden: jax.Array, table: Table, target_ids: jax.Array) -> Any:
        rows, length = target_ids.shape
        parts = plan.mesh.shape[plan.vocabulary_axis] if plan.mesh is not None and split_time else 1
        pieces = _pieces(rows, length, parts, plan.most_tokens)
        if pieces == 1:
            return piece(hidden, table, target_ids)
        # A piece has as many of each device's own positions as of any other's.
        size = length // (parts * pieces)
        states = hidden.reshape(rows, pieces, size, -1).swapaxes(0, 1)
        targets = jnp.moveaxis(target_ids.reshape(rows, parts, pieces, size), 2, 0).reshape(pieces, rows, -1)
        *of_tokens, unit = jax.lax.map(lambda each: piece(each[0], table, each[1]), (states, targets))
        if not with_gradient:
            of_tokens.append(unit)
        results = [
            jnp.moveaxis(each.reshape(pieces, rows, parts, size), 0, 2).reshape(rows, length) for each in of_tokens
        ]
        return (*results, unit.swapaxes(0, 1).reshape(hidden.shape)) if with_gradient else tuple(results)

    if plan.mesh is not None:
        tokens = P(plan.batch_axis, None)
        states = P(plan.batch_axis, plan.vocabulary_axis if split_time else None, None)
        local = jax.shard_map(
            local,
            mesh=plan.mesh,
            in_specs=(states, P(plan.vocabulary_axis, None), tokens),
            out_specs=(tokens, tokens, tokens) + ((states,) if with_gradient else ()),
            # JAX has nothing to derive here: equal results on the vocabulary axis come from the sums inside.
            check_vma=False,
        )
    results = local(hidden, table, target_ids)
    return results if with_gradient else (*results, None)


def _piece(
    hidden: jax.Array,
    table: Table,
    target_ids: jax.Array,
    *,
    plan: HeadPlan,
    vocabulary: int | None,
    split_time: bool,
    with_gradient: bool,
) -> tuple[jax.Array, ...]:
    """What `_forward` returns, of a device's part of a piece of time, without the gradient where none is wanted.

    `vocabulary` is how many of all rows are words, where rows were added; None: all.
    """
    if split_time:
        hidden = jax.lax.all_gather(hidden, plan.vocabulary_axis, axis=1, tiled=True)
    shape = target_ids.shape
    h = hidden.reshape(-1, hidden.shape[-1])
    offset = first_row(table, plan)
    targets = target_ids.reshape(-1) - offset
    words = None if vocabulary is None else vocabulary - offset
    maximum, total, best, mixed = _walk(h, table, plan, words, with_gradient)
    # The target's own logit comes from its row, which one device holds.
    target_rows = lookup(table, targets, h.dtype)
    target_logit = cap(jnp.sum(h.astype(jnp.float32) * target_rows.astype(jnp.float32), axis=-1), plan.soft_cap)
    if plan.mesh is not None:
        axis = plan.vocabulary_axis
        target_logit = jax.lax.psum(target_logit, axis)
        overall = jax.lax.pmax(maximum, axis)
        # The first of equal maxima, as argmax would take.
        best = jax.lax.pmin(jnp.where(maximum == overall, best + offset, jnp.iinfo(jnp.int32).max), axis)
        share = jnp.exp(maximum - overall)
        total = jax.lax.psum(total * share, axis)
        maximum = overall
    else:
        share = jnp.ones_like(maximum)
    log_sum = maximum + jnp.log(total)
    results = [log_sum - target_logit, best == target_ids.reshape(-1), log_sum]
    results = [each.reshape(shape) for each in results]
    if with_gradient:
        slope = cap_slope(target_logit, plan.soft_cap)
        unit = mixed * (share / total)[:, None] - slope[:, None] * target_rows.astype(jnp.float32)
        unit = unit.reshape(hidden.shape)
        if plan.mesh is not None:
            unit = sum_parts(unit, split_time, plan)
        results.append(unit.astype(hidden.dtype))
    return tuple(results)


def _pieces(rows: int, length: int, parts: int, most_tokens: int) -> int:
    """Return the number of equal parts along the sequence, each of at most this many tokens if possible."""
    pieces = 1
    while rows * length // pieces > most_tokens and length % (2 * pieces * parts) == 0:
        pieces *= 2
    return pieces


def _walk(
    h: jax.Array, table: Table, plan: HeadPlan, words: jax.Array | None, with_gradient: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Walk the device's rows: maximum, sum of exponentials, index of the maximum (tokens,), and the weighted rows.

    `words` is how many of them are words, where rows were added; None: all.
    """
    tokens = h.shape[0]

    def step(carry: Any, rows: jax.Array, start: jax.Array | int) -> Any:
        maximum, total, best, mixed = carry
        z = cap(jnp.einsum("nd,vd->nv", h, rows, preferred_element_type=jnp.float32), plan.soft_cap)
        slope = cap_slope(z, plan.soft_cap)
        if words is not None:
            # Not -inf: a device may hold no word at all, and its sum, of no weight then, must stay a number.
            z = jnp.where(start + jnp.arange(rows.shape[0]) < words, z, jnp.finfo(z.dtype).min)
        block_maximum = jnp.max(z, axis=-1)
        # The first of equal maxima, as argmax would take; XLA computes two plain reductions faster than one argmax, and
        # on a CPU those of floats, which are exact for numbers of this size.
        numbers = jax.lax.broadcasted_iota(jnp.float32, z.shape, 1)
        block_best = jnp.min(jnp.where(z == block_maximum[:, None], numbers, jnp.inf), axis=-1)
        best = jnp.where(block_maximum > maximum, block_best.astype(jnp.int32) + start, best)
        new_maximum = jnp.maximum(maximum, block_maximum)
        kept = jnp.exp(maximum - new_maximum)
        p = jnp.exp(z - new_maximum[:, None])
        total = total * kept + jnp.sum(p, axis=-1)
        if with_gradient:
            p = (p * slope).astype(rows.dtype)
            mixed = mixed * kept[:, None] + jnp.einsum("nv,vd->nd", p, rows, preferred_element_type=jnp.float32)
        return new_maximum, total, best, mixed

    carry = (
        jnp.full((tokens,), -jnp.inf, jnp.float32),
        jnp.zeros((tokens,), jnp.float32),
        jnp.zeros((tokens,), jnp.int32),
        jnp.zeros((tokens, h.shape[1]), jnp.float32) if with_gradient else None,
    )
    return _over_blocks(step, carry, table, plan.block_rows, h.dtype)


def _over_blocks(step: Any, carry: Any, table: Table, block_rows: int, dtype: Any) -> Any:
    """Run `step(carry, rows, start)` over the table's rows, block after block, the last one shorter if need be.

    Rows of codes come in `dtype`, others as they are.
    """
    full = table.shape[0] // block_rows

    def body(index: jax.Array, carry: Any) -> Any:
        start = index * block_rows
        block = jax.tree.map(lambda each: jax.lax.dynamic_slice_in_dim(each, start, block_rows), table)
        return step(carry, tied_table.values(block, dtype), start)

    if full:
        carry = jax.lax.fori_loop(0, full, body, carry)
    if table.shape[0] % block_rows:
        rest = jax.tree.map(lambda each: each[full * block_rows :], table)
        carry = step(carry, tied_table.values(rest, dtype), full * block_rows)
    return carry


def _table_gradient(
    hidden: jax.Array, table: jax.Array, target_ids: jax.Array, log_sum: jax.Array, weights: jax.Array, plan: HeadPlan
) -> jax.Array:
    """The gradient in the table, float32, block by block: the logits are computed again rather than stored."""

    def local(
        hidden: jax.Array, table: jax.Array, target_ids: jax.Array, log_sum: jax.Array, weights: jax.Array
    ) -> Any:
        h = hidden.reshape(-1, hidden.shape[-1])
        targets = target_ids.reshape(-1) - first_row(table, plan)
        log_sum, weights = log_sum.reshape(-1), weights.reshape(-1)

        def step(gradient: jax.Array, rows: jax.Array, start: jax.Array | int) -> jax.Array:
            z = cap(jnp.einsum("nd,vd->nv", h, rows, preferred_element_type=jnp.float32), plan.soft_cap)
            hit = targets[:, None] == start + jnp.arange(rows.shape[0])[None, :]
            p = (jnp.exp(z - log_sum[:, None]) - hit) * cap_slope(z, plan.soft_cap) * weights[:, None]
            block = jnp.einsum("nv,nd->vd", p.astype(h.dtype), h, preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_slice_in_dim(gradient, block, start, axis=0)

        gradient = _over_blocks(step, jnp.zeros(table.shape, jnp.float32), table, plan.block_rows, h.dtype)
        if plan.gathered_dimension is not None:
            return jax.lax.psum_scatter(
                gradient, plan.batch_axis, scatter_dimension=plan.gathered_dimension, tiled=True
            )
        return gradient if plan.mesh is None else jax.lax.psum(gradient, plan.batch_axis)

    if plan.mesh is not None:
        tokens = P(plan.batch_axis, None)
        local = jax.shard_map(
            local,
            mesh=plan.mesh,
            in_specs=(P(plan.batch_axis, None, None), P(plan.vocabulary_axis, None), tokens, tokens, tokens),
            out_specs=plan.kept,
            check_vma=False,
        )
    return local(hidden, table, target_ids, log_sum, weights)
