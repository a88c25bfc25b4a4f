"""The device mesh and the Keras distribution over it.

Purpose: the only place that makes `keras.distribution` objects, and that reads their JAX counterparts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    import keras

# The tutorial's names, in the order of `mesh.shape`.
AXES = ("batch", "model")


@dataclass(frozen=True)
class MeshShape:
    """The mesh as numbers: enough to resolve a layout, without any device."""

    shape: tuple[int, ...]
    axis_names: tuple[str, ...] = AXES

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis."""
        return dict(zip(self.axis_names, self.shape, strict=True))

    @property
    def devices(self) -> int:
        """Devices in all."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return "(" + ", ".join(f"{name}={size}" for name, size in self.sizes.items()) + ")"


def device_mesh(mesh: MeshShape) -> keras.distribution.DeviceMesh:
    """Return the Keras mesh over the first devices there are, in JAX's order."""
    import keras

    devices = keras.distribution.list_devices()[: mesh.devices]
    return keras.distribution.DeviceMesh(mesh.shape, list(mesh.axis_names), devices)


def jax_mesh(mesh: keras.distribution.DeviceMesh) -> jax.sharding.Mesh:
    """Return the JAX mesh behind a Keras mesh."""
    return mesh.backend_mesh


def distribution(
    mesh: keras.distribution.DeviceMesh, rules: Mapping[str, Sequence[Any]]
) -> keras.distribution.ModelParallel:
    """Return Keras' `ModelParallel` for some layout rules (anchored pattern to one axis or None a dimension)."""
    import keras

    layout_map = keras.distribution.LayoutMap(mesh)
    for pattern, spec in rules.items():
        layout_map[pattern] = tuple(spec)
    return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name=AXES[0])
