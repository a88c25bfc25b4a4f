"""Attention by blocks is the plain attention, in value and gradient: for every family, packed, and on every mesh."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core.model import attention, attention_blocks, attention_splash, decoder
from stages.core.model.attention_blocks import Scope
from stages.core.model.causal_lm import make_model
from stages.core.plan import topology
from tests.support.plans import has_libtpu
from tests.support.repository import FAMILIES
from tests.support.tiny_models import load_tiny, sequences

LENGTH, BLOCK = 45, 8
pytestmark = pytest.mark.usefixtures("devices")
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def random_arrays(heads=4, groups=2, dtype="float32"):
    """Queries, keys, values and weights of the result: two sequences, which no block divides."""
    generator = np.random.default_rng(0)

    def draw(heads):
        return jnp.asarray(generator.normal(0, 1, (2, LENGTH, heads, 16)), dtype)

    return draw(heads), draw(groups), draw(groups), draw(heads)


def segments():
    """One sequence of segments that end inside blocks, the first longer than the window, and padding; one of one."""
    return jnp.asarray([[1] * 22 + [2] * 3 + [3] * 13 + [0] * 7, [1] * LENGTH], jnp.int32)


def value_and_gradients(attend, query, key, value, weights):
    def loss(*arrays):
        result = attend(*arrays)
        return jnp.sum(result.astype(jnp.float32) * weights.astype(jnp.float32)), result

    (_, result), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    return [np.asarray(each, np.float32) for each in (result, *gradients)]


def plain(window, soft_cap):
    ids, places = segments(), np.arange(LENGTH)
    mask = attention.causal_mask(ids)
    if window is not None:
        mask = mask & (places[:, None] - places < window)
    return lambda query, key, value: attention._mix(query, key, value, mask, soft_cap)


def by_blocks(scope):
    return lambda *arrays: attention_blocks.attend(*arrays, segments(), segments(), jnp.int32(0), scope)


@pytest.mark.parametrize(
    ("groups", "window", "soft_cap"), [(4, None, None), (2, None, 2.0), (1, 10, 2.0), (2, 8, None), (4, 1, None)]
)
def test_blocks_give_the_plain_values_and_gradients(groups, window, soft_cap):
    arrays = random_arrays(groups=groups)
    expected = value_and_gradients(plain(window, soft_cap), *arrays)
    found = value_and_gradients(by_blocks(Scope(window, soft_cap, BLOCK)), *arrays)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE)


def test_gradients_of_bfloat16_are_as_near_to_exact_ones_as_the_plain_ones():
    exact = value_and_gradients(plain(10, 2.0), *random_arrays())
    arrays = random_arrays(dtype="bfloat16")
    usual, found = (value_and_gradients(each, *arrays) for each in (plain(10, 2.0), by_blocks(Scope(10, 2.0, BLOCK))))
    for one, other, true in zip(found, usual, exact, strict=True):
        assert np.abs(one - true).mean() < 1.1 * np.abs(other - true).mean()


def test_a_token_of_another_segment_changes_nothing():
    query, key, value, _ = random_arrays()
    attend = by_blocks(Scope(None, None, BLOCK))
    before = np.asarray(attend(query, key, value))
    after = np.asarray(attend(query, key, value.at[0, 21].add(100.0)))
    changed = np.abs(after - before).max((2, 3)) > 0
    assert np.flatnonzero(changed[0]).tolist() == [21], "the last token of the first segment"
    assert not changed[1].any()


def test_only_blocks_within_the_window_are_visited():
    for part in range(2):
        scope = Scope(window=10, soft_cap=None, size=8, parts=2)
        places = part * 20 + np.arange(20)
        back = places[:, None] - np.arange(40)
        seen = (back >= 0) & (back < 10)
        rows, columns = np.nonzero(seen)
        expected = sorted(set(zip((rows // 8).tolist(), (columns // 8).tolist(), strict=True)))
        assert attention_blocks.list_pairs(20, part, scope) == expected


def test_no_array_is_of_length_times_length():
    sizes = []

    def collect(jaxpr):
        for equation in jaxpr.eqns:
            sizes.extend(each.aval.size for each in equation.outvars if hasattr(each.aval, "size"))
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda each: hasattr(each, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    collect(inner)

    length = 2048
    query = jax.ShapeDtypeStruct((1, length, 2, 16), "float32")
    ids = jnp.ones((1, length), jnp.int32)

    def loss(query):
        return jnp.sum(attention_blocks.attend(query, query, query, ids, ids, jnp.int32(0), Scope(None, 2.0, 64)))

    collect(jax.make_jaxpr(jax.grad(loss))(query).jaxpr)
    assert len(sizes) > 100
    assert max(sizes) == length * 2 * 16


# As many groups of keys as heads (Gemma 7B), some (Gemma 2, 3 and 4) and one (Gemma 2B); of one block of keys all
# gradients are one kernel's.
@pytest.mark.parametrize(
    ("window", "soft_cap", "parts", "groups", "length", "size"),
    [
        (None, 2.0, 2, 2, 512, 128),
        (200, None, 1, 2, 512, 128),
        (None, None, 1, 4, 512, 512),
        (100, 2.0, 1, 1, 256, 256),
        (60, None, 1, 2, 128, 128),
        (200, None, 2, 1, 512, 256),
    ],
)
def test_the_tpus_kernel_gives_the_plain_values_and_gradients(window, soft_cap, parts, groups, length, size):
    """In JAX's interpreter of kernels; four heads, packed sequences that end in padding, queries of some devices."""
    scope = Scope(window, soft_cap, size, parts)
    generator = np.random.default_rng(0)
    query, key, value, weights = (
        jnp.asarray(generator.normal(0, 1, (2, length, heads, 128)), jnp.float32) for heads in (4, groups, groups, 4)
    )
    query = query / 8
    ends = (length // 2 + 44, length * 7 // 8)
    first = [1] * ends[0] + [2] * (ends[1] - ends[0]) + [0] * (length - ends[1])
    ids = jnp.asarray([first, [1] * length], jnp.int32)
    kernel = attention_splash.kernel(scope, length, 4, interpret=True)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:parts]), ("model",))
    split = P(None, "model")

    def by_kernel(query, key, value):
        return jax.shard_map(
            lambda *arrays: attention_splash.attend(*arrays, scope),
            mesh=mesh,
            in_specs=(attention_splash.kernel_spec(kernel, mesh, "model"), split, P(), P(), split, P()),
            out_specs=split,
            check_vma=False,
        )(kernel, query, key, value, ids, ids)

    mask, places = attention.causal_mask(ids), np.arange(length)
    if window is not None:
        mask = mask & (places[:, None] - places < window)

    expected = value_and_gradients(lambda *arrays: attention._mix(*arrays, mask, soft_cap), query, key, value, weights)
    for one, other in zip(value_and_gradients(by_kernel, query, key, value, weights), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-4)


@has_libtpu
@pytest.mark.parametrize(
    ("length", "dtype", "heads", "kernels"),
    [
        (128, "bfloat16", 4, True),
        (512, "bfloat16", 4, True),
        # Heads that do not divide: each device has a quarter of the queries.
        (640, "bfloat16", 3, False),
        (1024, "bfloat16", 3, True),
        (200, "bfloat16", 4, False),
        (512, "float32", 4, False),
    ],
)
def test_a_tpu_takes_its_kernel_for_short_sequences_too(length, dtype, heads, kernels):
    mesh = jax.sharding.Mesh(np.array(topology.describe("v5e:2x2").devices).reshape(1, 4), ("batch", "model"))
    laid = Laid(mesh, HEADS if heads == 4 else TIME, HEADS if heads == 4 else WHOLE)
    kind = SimpleNamespace(window=None, keys_of=None)

    def attend(ids, *arrays):
        return attention.SelfAttention(ids, laid).of_block(0, kind, None)(*arrays)

    spread = NamedSharding(mesh, P())
    arrays = [jax.ShapeDtypeStruct((1, length, heads, 128), dtype, sharding=spread)] * 3
    program = jax.jit(attend).lower(jax.ShapeDtypeStruct((1, length), "int32", sharding=spread), *arrays).as_text()
    assert ("tpu_custom_call" in program) == kernels


def test_a_kernel_is_asked_only_for_what_it_can_do():
    scope = Scope(window=512, soft_cap=50.0, size=512)
    assert attention_splash.expresses(scope, 4096, 256, jnp.bfloat16)
    refused = [(4096, 256, jnp.float32), (4096, 512, jnp.bfloat16), (4096, 96, jnp.bfloat16), (4000, 256, jnp.bfloat16)]
    assert not any(attention_splash.expresses(scope, *each) for each in refused)


def test_what_a_kernel_is_told_of_a_block_is_so():
    for window in (None, 5):
        band = attention_splash._Band(24, window)
        places = np.arange(24)
        mask = band.mask_function(places[:, None], places)
        for row, column in np.ndindex(6, 3):
            block = (slice(4 * row, 4 * row + 4), slice(8 * column, 8 * column + 8))
            assert (band[block].any(), band[block].all()) == (mask[block].any(), mask[block].all())


class Laid(NamedTuple):
    """Activations that lie on a mesh as a test says, not as weights do."""

    mesh: jax.sharding.Mesh
    query: P
    key: P

    def spec(self, array, role, block):
        return getattr(self, role)


WHOLE, HEADS, TIME = P("batch", None, None, None), P("batch", None, "model", None), P("batch", "model", None, None)


# Heads of queries, of keys, devices of the model axis; keys that are split beside whole queries are gathered.
@pytest.mark.parametrize(
    ("heads", "groups", "parts", "query", "key"),
    [
        (4, 2, 2, HEADS, HEADS),
        (4, 2, 4, HEADS, WHOLE),
        (6, 2, 2, HEADS, WHOLE),
        (12, 6, 4, HEADS, WHOLE),
        (3, 1, 4, TIME, WHOLE),
        (3, 3, 3, WHOLE, HEADS),
    ],
)
def test_devices_find_their_heads_and_keys_however_the_mesh_splits_them(monkeypatch, heads, groups, parts, query, key):
    monkeypatch.setattr(attention, "LONG", 40)
    monkeypatch.setattr(attention, "BLOCK", 4)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: 2 * parts]).reshape(2, parts), ("batch", "model"))
    generator = np.random.default_rng(0)
    sizes = (heads, groups, groups, heads)
    arrays = [jnp.asarray(generator.normal(0, 1, (2, 40, size, 8)), jnp.float32) for size in sizes]
    ids = jnp.asarray([[1] * 17 + [2] * 23, [1] * 33 + [0] * 7], jnp.int32)
    kind = SimpleNamespace(window=9, keys_of=None)
    by_blocks = attention.SelfAttention(ids, Laid(mesh, query, key)).of_block(0, kind, 2.0)
    monkeypatch.setattr(attention, "LONG", 41)
    plain = attention.SelfAttention(ids, Laid(mesh, query, key)).of_block(0, kind, 2.0)
    expected = value_and_gradients(plain, *arrays)
    for one, other in zip(value_and_gradients(by_blocks, *arrays), expected, strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE)


def step(model, batch):
    """The loss and the gradients of the adapter's weights."""
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    variables = causal.variables
    trained = [variable.path for variable in causal.trainable_variables]

    def loss(values):
        mapping = [(each, values.get(each.path, each.value)) for each in variables]
        with keras.StatelessScope(state_mapping=mapping):
            return causal.compute_loss(x=batch, y_pred=causal(batch))

    return jax.jit(jax.value_and_grad(loss))({each.path: each.value for each in variables if each.path in trained})


# Heads are split, or where they do not divide, queries over time; keys are split, or whole beside split heads.
@pytest.mark.parametrize("shape", [(2, 2), (1, 8)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_sequence_trains_as_a_short_one_on_every_mesh(presets, monkeypatch, family, shape):
    model = load_tiny(presets[family], shape, rank=2)
    batch = {name: jnp.asarray(values) for name, values in sequences(2, 40).items()}
    expected, usual = step(model, batch)
    monkeypatch.setattr(attention, "LONG", 40)
    monkeypatch.setattr(attention, "BLOCK", 4)
    monkeypatch.setattr(attention, "_mix", None)
    found, gradients = step(model, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for path, gradient in usual.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(gradients[path] / scale, gradient / scale, atol=2e-5, err_msg=path)
        assert scale > 1e-6


def test_heads_find_their_groups_however_devices_share_them():
    key = jnp.arange(6.0)[None, None, :, None]
    for devices in (1, 2, 3, 4, 6, 12):
        heads = 12 // devices
        for device in range(devices):
            groups = attention.groups_of(key, jnp.int32(device), heads, 2)[0, 0, :, 0]
            each = np.repeat(np.asarray(groups), heads // len(groups))
            assert each.tolist() == [(device * heads + head) // 2 for head in range(heads)]


def test_hidden_states_take_segments_instead_of_a_mask(presets, monkeypatch):
    """Of prompts, too, no mask of length x length is made."""
    monkeypatch.setattr(attention, "LONG", 16)
    monkeypatch.setattr(attention, "causal_mask", None)
    model = load_tiny(presets["gemma3"], (1, 1))
    embedded = jnp.ones((1, 16, model.backbone.hidden_dim))
    ids = jnp.ones((1, 16), jnp.int32)
    hidden = decoder.hidden_states(model.backbone, embedded, ids)
    last, _ = decoder.read_prompts(model.backbone, embedded, jnp.array([16]), 20)
    np.testing.assert_allclose(last, hidden[:, -1], **TOLERANCE)
