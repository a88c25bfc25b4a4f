"""The device mesh and the Keras distribution over it.

Purpose: the only place that makes `keras.distribution` objects, and that reads their JAX counterparts; it lays the
mesh so that what the model axis sends in every layer stays within a slice or host.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import mesh_utils

from stages.core.common.sizes import gibibytes
from stages.core.records.layout import AXES, MeshShape

logger = logging.getLogger(__name__)

# The most devices of a TPU's host.
TPU_HOST = 8


def device_mesh(mesh: MeshShape) -> keras.distribution.DeviceMesh:
    """Return the Keras mesh over the first devices there are, as `arranged` lays them."""
    return keras.distribution.DeviceMesh(mesh.shape, list(mesh.axis_names), arranged(mesh, jax.devices()))


def arranged(mesh: MeshShape, devices: Sequence[Any]) -> np.ndarray:
    """Return the first devices in the mesh's form, each row of the model axis within one group of `group_of` if it can.

    Between groups the network is slower than within, often ten times, so the batch axis, which sends once a step,
    crosses it. Within a TPU slice of more than a host, axes of the mesh become axes of the torus. On one host the order
    is JAX's.

    Args:
        mesh: axis names and sizes.
        devices: JAX devices, real or described, in JAX's order; at least as many as the mesh has.
    """
    chosen, axis = list(devices[: mesh.devices]), mesh.sizes[AXES[1]]
    groups: dict[int, list[Any]] = {}
    for device in chosen:
        groups.setdefault(group_of(device), []).append(device)
    if any(len(group) % axis for group in groups.values()):
        return np.array(chosen).reshape(mesh.shape)
    return np.concatenate([_within_group(groups[number], axis) for number in sorted(groups)])


def group_of(device: Any) -> int:
    """Return the number of the fast network that a device is on.

    JAX calls it a slice: of TPUs one that is wired together, of GPUs a host. Simulated devices have none: there a
    process represents a host.
    """
    return int(device.process_index if device.platform == "cpu" else getattr(device, "slice_index", None) or 0)


def _within_group(devices: list[Any], axis: int) -> np.ndarray:
    """Return (rows, axis) of the devices of a group."""
    shape = (len(devices) // axis, axis)
    if devices[0].platform == "tpu" and len(devices) > TPU_HOST:
        with contextlib.suppress(NotImplementedError, ValueError, AssertionError):  # JAX has no order for a part
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(shape)


def warn_of_slow_network(mesh: jax.sharding.Mesh, bytes_per_token: float, tokens: int | None = None) -> None:
    """Warn of a model axis that a slow network is part of, with the bytes that a step sends over it.

    Args:
        mesh: of the run.
        bytes_per_token: that a device sends along the model axis in a step for each token of its row.
        tokens: of a row of the mesh in a step; None: not known yet.
    """
    spans = max(len({group_of(device) for device in row}) for row in mesh.devices)
    if spans == 1:
        return
    sent = f"{gibibytes(bytes_per_token * tokens)} per step" if tokens else f"{bytes_per_token / 1e6:,.2f} MB per token"
    kind = {"tpu": "slices", "gpu": "hosts"}.get(mesh.devices.flat[0].platform, "processes")
    within = min(_sizes(mesh.devices.flat))
    logger.warning(
        f"the model axis of {mesh.shape[AXES[1]]} devices lies over {spans} {kind} and sends {sent} from each to "
        f"the next. Set mesh.shape to [{mesh.size // within}, {within}], whose model axis stays within, if the model "
        "fits (layout.shard_over_batch: weights splits it over the batch axis too)."
    )


def _sizes(devices: Any) -> list[int]:
    """Return how many of some devices each group has."""
    numbers = [group_of(device) for device in devices]
    return [numbers.count(number) for number in set(numbers)]


def jax_mesh(mesh: keras.distribution.DeviceMesh) -> jax.sharding.Mesh:
    """Return the JAX mesh behind a Keras mesh."""
    return mesh.backend_mesh


def distribution(
    mesh: keras.distribution.DeviceMesh, rules: Mapping[str, Sequence[Any]]
) -> keras.distribution.ModelParallel:
    """Return Keras' `ModelParallel` for some layout rules (anchored pattern to axes or None per dimension).

    Keras knows no dimension over two axes. A rule that has one is left out: it is for weights, which the loader places.
    """
    layout_map = keras.distribution.LayoutMap(mesh)
    for pattern, spec in rules.items():
        if not any(isinstance(entry, tuple) for entry in spec):
            layout_map[pattern] = tuple(spec)
    # `Batches` gives each process its own rows already.
    return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name=AXES[0], auto_shard_dataset=False)
