"""Where the mesh's axes lie: the model axis within a host or slice where it can, and a warning where it cannot."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from stages.core.records.layout import MeshShape
from stages.core.sharding.mesh import arranged, group_of, warn_of_slow_network
from tests.support.plans import has_libtpu


def gpus(hosts: int, each: int, *, interleaved: bool = False) -> list[SimpleNamespace]:
    """Devices of several hosts, as JAX tells them: with a process for each GPU, whatever its host."""
    order = [(host, gpu) for host in range(hosts) for gpu in range(each)]
    if interleaved:
        order.sort(key=lambda pair: pair[1])
    return [
        SimpleNamespace(platform="gpu", id=number, process_index=number, slice_index=host)
        for number, (host, _) in enumerate(order)
    ]


def hosts_of(row) -> set[int]:
    return {group_of(device) for device in row}


@pytest.mark.parametrize("interleaved", [False, True], ids=["in order", "interleaved"])
@pytest.mark.parametrize("shape", [(2, 8), (4, 4), (16, 1)], ids=str)
def test_rows_of_the_model_axis_lie_within_a_host(shape, interleaved):
    mesh = arranged(MeshShape(shape), gpus(2, 8, interleaved=interleaved))
    assert mesh.shape == shape
    assert all(len(hosts_of(row)) == 1 for row in mesh)
    assert sorted(device.id for device in mesh.flat) == list(range(16))


def test_one_host_keeps_jaxs_order(devices):
    found = arranged(MeshShape((2, 4)), jax.devices())
    assert [device.id for device in found.flat] == list(range(devices))
    # More devices than the mesh has: the first ones.
    assert [device.id for device in arranged(MeshShape((1, 2)), gpus(2, 8)).flat] == [0, 1]


def described_mesh(shape, devices):
    return SimpleNamespace(
        devices=arranged(MeshShape(shape), devices),
        shape=dict(zip(("batch", "model"), shape, strict=True)),
        size=int(np.prod(shape)),
    )


def test_a_model_axis_over_two_hosts_is_warned_of_with_what_it_sends(logged):
    warn_of_slow_network(described_mesh((1, 16), gpus(2, 8)), 1.0e6, 4096)
    warn_of_slow_network(described_mesh((1, 16), gpus(2, 8)), 1.0e6)
    of_step, of_token = logged()
    assert "model axis of 16 devices lies over 2 hosts and sends 3.81 GiB per step" in of_step
    assert "Set mesh.shape to [2, 8]" in of_step
    assert "sends 1.00 MB per token" in of_token


def test_a_model_axis_within_a_host_is_not_warned_of(logged):
    warn_of_slow_network(described_mesh((2, 8), gpus(2, 8)), 1.0e6, 4096)
    assert not logged()


@pytest.fixture(scope="module")
def slices(devices):
    """Describes slices of TPUs that are not here."""
    from jax.experimental import topologies

    from stages.core.plan.topology import describe

    def of(name: str, count: int = 1):
        if count == 1:
            return describe(name).devices
        # libtpu's environment is set by the first.
        describe(name)
        return topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=count).devices

    return of


@has_libtpu
def test_the_batch_axis_crosses_two_tpu_slices(slices):
    found = arranged(MeshShape((4, 8)), slices("v5e:4x4", 2))
    assert [hosts_of(row) for row in found] == [{0}, {0}, {1}, {1}]


@has_libtpu
@pytest.mark.parametrize(("name", "shape"), [("v5e:8x8", (8, 8)), ("v5p:4x4x4", (16, 4))])
def test_a_row_is_a_line_of_a_slice_of_several_hosts(slices, name, shape):
    """In JAX's order it would be a block of two hosts, or one host."""
    for row in arranged(MeshShape(shape), slices(name)):
        assert sorted(len({device.coords[axis] for device in row}) for axis in range(3)) == [1, 1, shape[1]]


@has_libtpu
def test_a_host_of_eight_chips_keeps_jaxs_order(slices):
    given = slices("v5e:2x4")
    assert [device.id for device in arranged(MeshShape((2, 4)), given).flat] == [device.id for device in given]
