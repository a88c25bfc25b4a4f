"""Gemma's projections on a mesh: what is gathered, multiplied and summed, written out instead of left to XLA.

Purpose: a block's projections come in pairs, the first split over its output (columns), the second over its input
(rows), as in Megatron-LM (https://arxiv.org/abs/1909.08053) with sequence parallelism
(https://arxiv.org/abs/2205.05198). Hidden states between blocks are split over time; they are gathered once for all
projections of the same input, and a row-split product's partial sums are added and split over time in one operation.
Left to itself XLA sums the gradient of each projection's input on its own, and sums whole activations on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core.layout import Placement, axes_of
from stages.core.lora import Dropout, apply, arrays_of, project

KERNELS = ("kernel", "lora_kernel_a", "lora_kernel_b")


class Projections:
    """Applies groups of `EinsumDense` layers, each as its kernel is split."""

    def __init__(self, mesh: Mesh | None = None, placements: Sequence[Placement] = ()) -> None:
        """Take the mesh, and where each kernel lies on it; without a mesh, one device is meant."""
        self._mesh = mesh
        self._specs = {placement.weight.path: placement.spec for placement in placements}

    def columns(self, layers: Sequence[Any], x: jax.Array, dropout: Dropout | None = None) -> list[jax.Array]:
        """Apply several layers to the same hidden states (batch, length, hidden), split over time or whole.

        The outputs are whole over time and split as the kernels' output dimensions are.
        """
        specs = [self._layer_specs(layer) for layer in layers]
        if dropout is not None or any(each is None or self._splits_input(each) for each in specs):
            x = self._hold(x, "batch", None, None)
            return [self._hold(project(layer, x, dropout), "batch", None, *self._output(layer)) for layer in layers]
        split_time = self._splits_time(x)

        def local(x: jax.Array, groups: list[dict[str, jax.Array]]) -> list[jax.Array]:
            if split_time:
                x = jax.lax.all_gather(x, "model", axis=1, tiled=True)
            return [apply(layer, x, arrays) for layer, arrays in zip(layers, groups, strict=True)]

        outputs = [P("batch", None, *self._output(layer)) for layer in layers]
        return jax.shard_map(
            local,
            mesh=self._mesh,
            in_specs=(P("batch", "model" if split_time else None, None), self._array_specs(layers, specs)),
            out_specs=outputs,
        )(x, [arrays_of(layer) for layer in layers])

    def rows(self, layer: Any, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Apply a layer whose kernel is split over its input, to an activation split likewise.

        The output (batch, length, hidden) is split over time where the axis divides that.
        """
        specs = self._layer_specs(layer)
        if dropout is not None or specs is None or specs["kernel"][-1] is not None:
            x = self._hold(x, "batch", None, *self._kernel(layer)[:-1])
            return self._hold(project(layer, x, dropout), "batch", None, None)
        split_time = self._splits_time(x)

        def local(x: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
            partial = apply(layer, x, arrays)
            if split_time:
                return jax.lax.psum_scatter(partial, "model", scatter_dimension=1, tiled=True)
            return jax.lax.psum(partial, "model")

        return jax.shard_map(
            local,
            mesh=self._mesh,
            in_specs=(P("batch", None, *specs["kernel"][:-1]), self._array_specs([layer], [specs])[0]),
            out_specs=P("batch", "model" if split_time else None, None),
        )(x, arrays_of(layer))

    def _layer_specs(self, layer: Any) -> dict[str, tuple[Any, ...]] | None:
        """Return the specs of a layer's arrays, or None where XLA is to find its own way."""
        if self._mesh is None or self._mesh.shape["model"] == 1:
            return None
        specs = {name: self._specs[f"{layer.path}/{name}"] for name in KERNELS if f"{layer.path}/{name}" in self._specs}
        if any("batch" in axes_of(axis) for spec in specs.values() for axis in spec):
            return None
        kernel = specs["kernel"]
        # A device's parts fit each other only where the adapter is split as its kernel is; some layouts replicate it.
        if "lora_kernel_a" in specs and (specs["lora_kernel_a"][:-1], specs["lora_kernel_b"][-1]) != (
            kernel[:-1],
            kernel[-1],
        ):
            return None
        return specs if any(axes_of(axis) for axis in kernel) else None

    def _kernel(self, layer: Any) -> tuple[Any, ...]:
        """Return how a layer's kernel is split over the model axis; activations have spent the batch axis already."""
        spec = self._specs.get(f"{layer.path}/kernel", (None,) * len(layer._kernel.shape))
        return tuple(None if "batch" in axes_of(axis) else axis for axis in spec)

    def _output(self, layer: Any) -> tuple[Any, ...]:
        """Return how the output of a layer that takes hidden states is split, after batch and time.

        Its kernel is (heads, hidden, head) or (hidden, ffw): all but the second last are the output's dimensions.
        """
        spec = self._kernel(layer)
        return (*spec[:-2], spec[-1])

    def _hold(self, array: jax.Array, *spec: Any) -> jax.Array:
        """Tell XLA how an activation is split; without that XLA 0.10 was seen to sum a gradient over half the heads."""
        if self._mesh is None:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(self._mesh, P(*spec)))

    def _splits_input(self, specs: dict[str, tuple[Any, ...]]) -> bool:
        """Whether a kernel that takes hidden states is split over them: its second last dimension."""
        return specs["kernel"][-2] is not None

    def _splits_time(self, x: jax.Array) -> bool:
        return x.shape[1] % self._mesh.shape["model"] == 0

    def _array_specs(self, layers: Sequence[Any], specs: Sequence[dict[str, tuple[Any, ...]]]) -> list[dict[str, P]]:
        return [{name: P(*each[name]) for name in arrays_of(layer)} for layer, each in zip(layers, specs, strict=True)]
