"""Products that go round a ring of devices are those of the whole activation, in value and gradient."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from stages.core.model import rings, tensor_parallel
from stages.core.sharding.mesh import MeshShape, device_mesh, jax_mesh
from tests.support.passes import loss_and_gradients
from tests.support.repository import FAMILIES
from tests.support.tiny_models import load_tiny, sequences

# As two rows of chips are numbered, and as they are wired.
ORDERS = {3: (0, 1, 2), 4: (0, 1, 3, 2), 8: (0, 1, 3, 5, 7, 6, 4, 2)}


@pytest.fixture
def any_size(monkeypatch):
    """Tiny products go round too."""
    monkeypatch.setattr(rings, "LEAST_TOKENS", 0)
    monkeypatch.setattr(rings, "LEAST_WEIGHTS", 0)


def chips(*places: tuple[int, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(platform="tpu", coords=place) for place in places]


def box(*sizes: int) -> list[SimpleNamespace]:
    """Chips in JAX's order: the first coordinate changes fastest."""
    return chips(*(place[::-1] for place in np.ndindex(*sizes[::-1])))


@pytest.mark.parametrize("sizes", [(2, 2), (2, 4), (4, 4), (2, 2, 2)])
def test_a_box_of_chips_is_a_ring_of_neighbours(sizes):
    devices = box(*sizes)
    order = rings.ring_of(devices).order
    assert sorted(order) == list(range(len(devices)))
    for one, other in zip(order, [*order[1:], order[0]], strict=True):
        assert np.abs(np.subtract(devices[one].coords, devices[other].coords)).sum() == 1


def test_both_devices_of_a_chip_are_neighbours():
    assert rings.ring_of(chips(*((x, y, 0) for y in (0, 1) for x in (0, 1) for _ in "ab"))) is not None


def test_what_is_no_ring_is_left_to_xla(devices):
    assert rings.ring_of(box(8)) is None, "the last chip of a row is far from the first"
    assert rings.ring_of(box(3, 3)) is None
    assert rings.ring_of(box(2)) is None, "both neighbours are one"
    assert rings.ring_of(jax.devices()) is None, "simulated devices have no links"


@pytest.mark.parametrize(("shape", "gated"), [((1, 8), True), ((2, 4), False), ((2, 3), True)], ids=str)
def test_products_round_a_ring_are_those_of_the_whole(any_size, shape, gated):
    random = np.random.default_rng(0)
    size = shape[1]
    ring = rings.Ring(ORDERS[size])
    x, wide, up, down = (
        random.normal(size=sizes).astype("f4")
        for sizes in ((2 * shape[0], 4 * size, 6), (6, 2, 2 * size), (6, 2, 2 * size), (2, 2 * size, 6))
    )

    def spread(x, weights):
        return [jnp.einsum("btd,dnf->btnf", x, weight) for weight in weights]

    def narrow(x, weights):
        return [jnp.einsum("btnf,nfd->btd", x, weights[0])]

    def gate(one, other):
        return [jnp.sin(one) * other]

    def rounds(x, wide, up, down):
        found = rings.gathered_products(ring, spread, x, [wide, up], gate if gated else None)
        (mixed,) = found if gated else gate(*found)
        return rings.scattered_sum(ring, narrow, mixed, [down])

    def at_once(x, wide, up, down):
        (mixed,) = gate(*spread(jax.lax.all_gather(x, "model", axis=1, tiled=True), [wide, up]))
        return jax.lax.psum_scatter(narrow(mixed, [down])[0], "model", scatter_dimension=1, tiled=True)

    def on_mesh(local):
        columns, rows = P(None, None, "model"), P(None, "model", None)
        run = jax.shard_map(
            local,
            mesh=jax_mesh(device_mesh(MeshShape(shape))),
            in_specs=(P("batch", "model"), columns, columns, rows),
            out_specs=P("batch", "model"),
        )
        return jax.jit(jax.value_and_grad(lambda x: (run(x, wide, up, down) ** 2).sum()))(x)

    (value, gradient), (wanted, wanted_gradient) = on_mesh(rounds), on_mesh(at_once)
    assert value == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-4, atol=1e-4 * np.abs(wanted_gradient).max())


ADAPTED = ("query", "value"), ("query", "value", "ffw_gating", "attention_output")


# Where the feed-forward has no adapter, its activation is part of the ring.
@pytest.mark.parametrize(
    ("family", "shape", "targets"),
    [(family, ((1, 8), (2, 4))[place // 2], ADAPTED[place % 2]) for place, family in enumerate(FAMILIES)],
    ids=str,
)
def test_a_step_round_rings_has_the_same_gradients(presets, any_size, monkeypatch, family, shape, targets):
    batch = sequences(4)
    model = load_tiny(presets[family], shape, rank=2, targets=targets)
    wanted, wanted_gradients = loss_and_gradients(model, batch)
    sent = []
    monkeypatch.setattr(tensor_parallel, "ring_of", lambda devices: rings.Ring(ORDERS[shape[1]]))
    monkeypatch.setattr(rings.Ring, "send", lambda *asked, send=rings.Ring.send: sent.append(1) or send(*asked))
    loss, gradients = loss_and_gradients(model, batch)
    assert sent, "nothing went round"
    assert loss == pytest.approx(wanted, rel=2e-6)
    for path, gradient in gradients.items():
        scale = np.abs(wanted_gradients[path]).max()
        np.testing.assert_allclose(gradient, wanted_gradients[path], rtol=1e-3, atol=3e-5 * scale, err_msg=path)


def test_what_is_too_small_is_gathered_at_once(presets, monkeypatch):
    monkeypatch.setattr(tensor_parallel, "ring_of", lambda devices: rings.Ring(ORDERS[8]))
    monkeypatch.setattr(rings.Ring, "send", lambda *_: pytest.fail("a small product went round"))
    loss_and_gradients(load_tiny(presets["gemma"], (1, 8), rank=2), sequences(4))


def test_trained_weights_do_not_go_round(presets, any_size, monkeypatch):
    monkeypatch.setattr(tensor_parallel, "ring_of", lambda devices: rings.Ring(ORDERS[8]))
    monkeypatch.setattr(rings.Ring, "send", lambda *_: pytest.fail("a trained weight's product went round"))
    loss_and_gradients(load_tiny(presets["gemma"], (1, 8), rank=0), sequences(4))
