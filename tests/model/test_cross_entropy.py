"""The output head against the plain computation: full logits, log-softmax, automatic gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stages.core.model import cross_entropy, tied_table
from stages.core.sharding.mesh import MeshShape, device_mesh, jax_mesh

BATCH, LENGTH, HIDDEN, VOCABULARY = 4, 8, 16, 104


@pytest.fixture(scope="module")
def case(devices: int):
    """Random hidden states, table, targets and token weights."""
    random = np.random.default_rng(0)
    return (
        random.normal(size=(BATCH, LENGTH, HIDDEN)).astype("f4"),
        random.normal(size=(VOCABULARY, HIDDEN)).astype("f4"),
        random.integers(0, VOCABULARY, (BATCH, LENGTH)).astype("i4"),
        random.uniform(size=(BATCH, LENGTH)).astype("f4"),
    )


def plain(hidden, table, targets, soft_cap):
    """The losses and hits from full logits."""
    logits = jnp.einsum("btd,vd->btv", hidden, table)
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return loss, jnp.argmax(logits, -1) == targets


def plan_for(shape, soft_cap, trained, block_rows):
    """The head's plan on a mesh, or on one device."""
    mesh = None if shape is None else jax_mesh(device_mesh(MeshShape(shape)))
    return tied_table.HeadPlan(soft_cap, mesh, table_is_trained=trained, block_rows=block_rows)


SHAPES = [None, (1, 8), (2, 4), (4, 2), (4, 1), (1, 3), (1, 5), (2, 3), (1, 7)]
BLOCK_ROWS = (5, 13, 1000)


# Each mesh with and without a soft cap, and with two of the three block sizes.
@pytest.mark.parametrize(
    ("shape", "soft_cap", "block_rows"),
    [
        (shape, soft_cap, BLOCK_ROWS[(place + further) % 3])
        for place, shape in enumerate(SHAPES)
        for further, soft_cap in enumerate((None, 3.0))
    ],
    ids=str,
)
def test_loss_hits_and_gradients_equal_the_plain_computation(case, shape, soft_cap, block_rows):
    hidden, table, targets, weights = case
    # A target that is the likeliest word somewhere, so that a hit is seen too.
    targets = targets.copy()
    targets[0] = np.asarray(jnp.argmax(jnp.einsum("btd,vd->btv", hidden, table), -1))[0]

    def ours(hidden, table):
        loss, hit = cross_entropy.token_losses(hidden, table, targets, plan_for(shape, soft_cap, True, block_rows))
        return (loss * weights).sum(), (loss, hit)

    def theirs(hidden, table):
        loss, hit = plain(hidden, table, targets, soft_cap)
        return (loss * weights).sum(), (loss, hit)

    by_us, by_them = (jax.jit(jax.value_and_grad(each, (0, 1), has_aux=True)) for each in (ours, theirs))
    (_, (loss, hit)), gradients = by_us(hidden, table)
    (_, (wanted, wanted_hit)), wanted_gradients = by_them(hidden, table)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(hit, wanted_hit)
    assert wanted_hit[0].all()
    for ours_, theirs_ in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(ours_, theirs_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "pieces"), [(None, 8), ((2, 4), 2), ((4, 2), 4)], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_tokens_that_walk_the_table_in_pieces_come_to_the_same(case, shape, pieces, trained):
    hidden, table, targets, weights = case
    whole = plan_for(shape, 3.0, trained, 13)
    parts, rows = (1, BATCH) if shape is None else (shape[1], BATCH // shape[0])
    assert cross_entropy._pieces(rows, LENGTH, parts, 1) == pieces
    assert cross_entropy._pieces(rows, LENGTH, parts, rows * LENGTH) == 1
    found = []
    for plan in (whole, dataclasses.replace(whole, most_tokens=1)):

        def loss(hidden, plan=plan):
            losses, hits = cross_entropy.token_losses(hidden, table, targets, plan)
            return (losses * weights).sum(), (losses, hits)

        (_, of_tokens), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(hidden)
        measured = jax.jit(cross_entropy.token_losses, static_argnums=3)(hidden, table, targets, plan)
        found.append((*of_tokens, gradient, *measured))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(np.asarray(one, "f4"), np.asarray(other, "f4"), rtol=1e-5, atol=1e-6)


def test_a_frozen_table_costs_no_second_pass(case):
    hidden, table, targets, weights = case

    def loss(hidden, trained):
        losses, _ = cross_entropy.token_losses(hidden, table, targets, plan_for(None, None, trained, 13))
        return (losses * weights).sum()

    for trained in (False, True):
        gradient = jax.jit(jax.grad(loss), static_argnums=1)(hidden, trained)
        wanted = jax.jit(jax.grad(lambda h: (plain(h, table, targets, None)[0] * weights).sum()))(hidden)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_no_array_of_tokens_by_vocabulary_is_ever_made(case):
    hidden, table, targets, weights = case
    plan = plan_for(None, None, True, 13)

    def loss(hidden, table):
        return (cross_entropy.token_losses(hidden, table, targets, plan)[0] * weights).sum()

    program = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile().as_text()
    tokens = BATCH * LENGTH
    assert f"f32[{tokens},13]" in program
    for forbidden in (f"[{tokens},{VOCABULARY}]", f"[{VOCABULARY},{tokens}]", f"[{BATCH},{LENGTH},{VOCABULARY}]"):
        assert forbidden not in program


def test_devices_that_hold_no_word_at_all_add_nothing(case):
    hidden, table, targets, weights = case
    few = table[:9]  # Two rows each for four devices of seven, one for the fifth.
    targets = targets % 9
    for soft_cap in (None, 3.0):
        plan = plan_for((1, 7), soft_cap, True, 1000)

        def loss(hidden, table, by):
            losses, hits = by(hidden, table)
            return (losses * weights).sum(), (losses, hits)

        def ours(hidden, table, plan=plan):
            return cross_entropy.token_losses(hidden, table, targets, plan)

        def theirs(hidden, table, soft_cap=soft_cap):
            return plain(hidden, table, targets, soft_cap)

        gradients = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
        results = [gradients(hidden, few, by) for by in (ours, theirs)]
        for one, other in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(np.asarray(one, "f4"), np.asarray(other, "f4"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [None, (1, 8), (2, 4), (1, 5), (2, 3)], ids=str)
def test_the_embedding_and_its_gradient_are_the_plain_lookup(case, shape):
    _, table, ids, _ = case
    plan = plan_for(shape, None, True, 13)
    embed = jax.jit(lambda table: tied_table.embed(table, ids, plan))
    np.testing.assert_array_equal(embed(table), table[ids])
    ours = jax.jit(jax.grad(lambda table: (embed(table) ** 2).sum()))(table)
    theirs = jax.grad(lambda table: (table[ids] ** 2).sum())(table)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("shape", [None, (1, 8), (2, 4)], ids=str)
def test_a_token_that_occurs_1025_times_gets_the_sum_of_its_1025_gradients(case, shape):
    """Bfloat16 has 8 bits: counting by ones, it stays at 256."""
    _, table, _, _ = case
    plan = plan_for(shape, None, True, 13)
    ids = np.where(np.arange(2048) < 1025, 7, 9).reshape(2, 1024).astype("i4")
    embed = jax.jit(lambda table, plan: tied_table.embed(table, ids, plan, "bfloat16"), static_argnums=1)
    np.testing.assert_array_equal(embed(table, plan), table.astype(jnp.bfloat16)[ids])
    gradient = jax.jit(jax.grad(lambda table: embed(table, plan).astype("float32").sum()))(table)
    np.testing.assert_array_equal(gradient[7], np.full(HIDDEN, 1025, "f4"))
    np.testing.assert_array_equal(gradient[9], np.full(HIDDEN, 1023, "f4"))
    frozen = dataclasses.replace(plan, table_is_trained=False)
    np.testing.assert_array_equal(embed(table, frozen), table.astype(jnp.bfloat16)[ids])


@pytest.mark.parametrize("shape", [(2, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("coded", [False, True], ids=["floats", "codes"])
def test_a_few_tokens_logits_are_plain_and_the_product_is_of_a_devices_own_rows(monkeypatch, case, shape, coded):
    table, hidden = case[1], case[0][: shape[0], 0]
    held = table
    if coded:
        scale = np.abs(table).max(1, keepdims=True) / 127
        held = tied_table.Codes(np.round(table / scale).astype("i1"), scale)
        table = held.codes * scale
    rows, product = [], tied_table.few_rows_transposed
    monkeypatch.setattr(tied_table, "few_rows_transposed", lambda x, w: rows.append(len(x)) or product(x, w))
    plan = plan_for(shape, 3.0, False, 13)
    found = jax.jit(lambda hidden, held: tied_table.logits(hidden, tied_table.padded(held, plan), VOCABULARY, plan))(
        hidden, held
    )
    np.testing.assert_allclose(found, 3.0 * np.tanh(hidden @ table.T / 3.0), rtol=1e-5, atol=1e-5)
    assert rows == [1]
