"""Arrays over the devices of several processes: which rows are this one's, and values from and to the host.

Purpose: `np.asarray` and `jax.device_put` serve a process alone; of several each holds a part only. All of these are
to be called by all processes in the same order, since they talk with one another.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core.common.errors import StageError
from stages.core.processes.group import current
from stages.core.records.layout import MeshShape


def check_split(mesh: MeshShape, count: int) -> int:
    """Return how many devices of a mesh each of some processes has.

    Args:
        mesh: axis names and sizes.
        count: of the processes.

    Raises:
        StageError: they cannot have as many each, or a row of the mesh's batch axis would be split unevenly.
    """
    each, rest = divmod(mesh.devices, count)
    model = mesh.sizes["model"]
    if rest or not each or (each % model and model % each):
        raise StageError(
            f"{count} processes must each have as many devices of the mesh, and whole rows of its batch axis or an "
            f"equal part of one. Received: mesh.shape={list(mesh.shape)}, {mesh.devices} devices on {count} processes."
        )
    return each


def held_rows(rows: int, mesh: MeshShape) -> slice:
    """Return which rows of a batch are on this process's devices; all of them where it is alone.

    Args:
        rows: of the whole batch, a multiple of the mesh's batch axis.
        mesh: axis names and sizes; devices are in the order of processes.
    """
    group = current()
    if group.count == 1:
        return slice(0, rows)
    each, model = check_split(mesh, group.count), mesh.sizes["model"]
    size = rows // mesh.sizes["batch"]
    first, last = group.index * each // model, (group.index * each + each - 1) // model
    return slice(first * size, (last + 1) * size)


def whole(array: Any) -> np.ndarray:
    """Return an array's values on the host, gathered from all processes that hold parts of it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def put(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return a value that all processes have, split over the devices: each gives its own their parts."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    local = np.asarray(value)
    return jax.make_array_from_callback(local.shape, sharding, lambda index: local[index])


def from_first(value: np.ndarray | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return the first process's value on all, bit by bit.

    Args:
        value: on the first process; ignored on the others.
        shape: of the value, on all.
        dtype: of the value, on all.

    Raises:
        ValueError: the value has another shape.
    """
    if current().count == 1:
        if value is None:
            raise ValueError("the first process has no value to give")
        return value
    own = np.zeros(shape, dtype) if value is None else np.asarray(value, dtype)
    if own.shape != tuple(shape):
        raise ValueError(f"the value must have the shape {shape}, not {own.shape}")
    # As whole numbers, whose sum with zeros is the number itself, whatever it represents.
    bits = own.reshape(-1).view(f"uint{8 * own.dtype.itemsize}")
    found = np.asarray(multihost_utils.broadcast_one_to_all(bits, is_source=current().first))
    return found.astype(bits.dtype, copy=False).view(own.dtype).reshape(shape)


def on_every_process(array: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """Return an array of a program held whole by every device, where some of them are other processes'."""
    if mesh is None or current().count == 1:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P()))
