"""The device mesh and the Keras distribution over it.

Purpose: the only place that makes `keras.distribution` objects, and that reads their JAX counterparts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import keras

from stages.core.records.layout import AXES, MeshShape


def device_mesh(mesh: MeshShape) -> keras.distribution.DeviceMesh:
    """Return the Keras mesh over the first devices there are, in JAX's order."""
    devices = keras.distribution.list_devices()[: mesh.devices]
    return keras.distribution.DeviceMesh(mesh.shape, list(mesh.axis_names), devices)


def jax_mesh(mesh: keras.distribution.DeviceMesh) -> jax.sharding.Mesh:
    """Return the JAX mesh behind a Keras mesh."""
    return mesh.backend_mesh


def distribution(
    mesh: keras.distribution.DeviceMesh, rules: Mapping[str, Sequence[Any]]
) -> keras.distribution.ModelParallel:
    """Return Keras' `ModelParallel` for some layout rules (anchored pattern to one axis or None a dimension)."""
    layout_map = keras.distribution.LayoutMap(mesh)
    for pattern, spec in rules.items():
        layout_map[pattern] = tuple(spec)
    # `Batches` gives each process its own rows already.
    return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name=AXES[0], auto_shard_dataset=False)
