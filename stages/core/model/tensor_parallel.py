"""Gemma's projections on a mesh: what is gathered, multiplied and summed, written out instead of left to XLA.

Purpose: a block's projections come in pairs, the first split over its output (columns), the second over its input
(rows), as in Megatron-LM (https://arxiv.org/abs/1909.08053) with sequence parallelism
(https://arxiv.org/abs/2205.05198). Hidden states between blocks are split over time; they are gathered once for all
projections of the same input, and a row-split product's partial sums are added and split over time in one operation.
Left to itself XLA sums the gradient of each projection's input on its own, and sums whole activations on every device.

An adapter's A is applied before the gathering, by each device to its own positions, and what comes out (rank numbers a
head instead of the hidden size) is handed on: so the gathered hidden states, which a frozen kernel's gradients do not
need, are not kept for the backward pass, where they would be most of a block's activations outside its feed-forward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core.model.experts import ExpertBanks
from stages.core.model.lora import BESIDE_CODES, Dropout, Gathering, apply, arrays_of, base, narrowed, widen
from stages.core.model.products import MOST_JOINED, gathered, joined_products
from stages.core.sharding.keras_internals import kernel_of
from stages.core.sharding.layout import Placement, axes_of

KERNELS = ("kernel", *BESIDE_CODES, "lora_kernel_a", "lora_kernel_b")


class Projections:
    """Applies groups of `EinsumDense` layers, each as its kernel is split.

    Attributes:
        experts: the same of a block's experts.
    """

    def __init__(
        self, mesh: Mesh | None = None, placements: Sequence[Placement] = (), *, keep_gathered: bool = False
    ) -> None:
        """Take the mesh and each kernel's sharding; without a mesh there is one device.

        Args:
            mesh: of the devices.
            placements: of the weights.
            keep_gathered: keep a kernel that was gathered over the batch axis for the backward pass, where the whole
                block is computed again just before.
        """
        self._mesh = mesh
        self._divides = mesh is not None and mesh.shape["model"] > 1
        self._placed = {placement.weight.path: placement for placement in placements}
        self._again = not keep_gathered
        self._on_tpu = mesh is not None and mesh.devices.flat[0].platform == "tpu"
        self.experts = ExpertBanks(mesh, placements, keep_gathered=keep_gathered)

    def columns(self, layers: Sequence[Any], x: jax.Array, dropout: Dropout | None = None) -> list[jax.Array]:
        """Apply several layers to the same hidden states (batch, length, hidden), split over time or whole.

        The outputs are whole over time and split as the kernels' output dimensions are; but of whole hidden states
        (a sampler's tokens), heads that are split inside come whole.
        """
        found = [self._layer_specs(layer) for layer in layers]
        specs = [each for each in found if each is not None and not self._splits_input(each)]
        if dropout is not None or len(specs) < len(layers):
            x = self._hold(x, "batch", None, None)
            return [
                self._hold(self._project(layer, x, dropout), "batch", None, *self._output(layer)) for layer in layers
            ]
        split_time = self.splits_time(x)

        # Attention needs whole heads, which are exchanged over time where that can be split.
        gather = not split_time and all(len(each["kernel"]) == 3 and each["kernel"][-1] == "model" for each in specs)

        gatherings = [self._gathering(layer) for layer in layers]

        def local(x: jax.Array, groups: list[dict[str, jax.Array]]) -> list[jax.Array]:
            groups = [self._whole_adapter(layer, arrays) for layer, arrays in zip(layers, groups, strict=True)]
            each = list(zip(layers, groups, gatherings, strict=True))
            if not split_time:
                parts = [apply(layer, x, arrays, gathering=gathering) for layer, arrays, gathering in each]
                return _whole_heads(parts) if gather else parts
            narrow = _narrow_everywhere(layers, x, groups, specs)
            x = jax.lax.all_gather(x, "model", axis=1, tiled=True)
            if self._on_tpu and _joins(layers, groups, gatherings):
                found = joined_products(x, [arrays["kernel"].astype(x.dtype) for arrays in groups])
            else:
                found = [base(layer, x, arrays, gathering=gathering) for layer, arrays, gathering in each]
            # A TPU's compiler would write heads in another order before it takes all dimensions but the last for one.
            return [
                y + (widen(layer, narrow[layer.path], arrays, divided=self._on_tpu) if layer.path in narrow else 0)
                for y, layer, arrays in zip(found, layers, groups, strict=True)
            ]

        outputs = [P("batch", None, *(() if gather else self._output(layer))) for layer in layers]
        return jax.shard_map(
            local,
            mesh=self._mesh,
            in_specs=(P("batch", "model" if split_time else None, None), self._array_specs(layers)),
            out_specs=outputs,
        )(x, [arrays_of(layer) for layer in layers])

    def rows(self, layer: Any, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Apply a layer whose kernel is split over its input, to an activation split likewise.

        The output (batch, length, hidden) is split over time where the axis divides that.
        """
        specs = self._layer_specs(layer)
        if dropout is not None or specs is None or specs["kernel"][-1] is not None:
            x = self._hold(x, "batch", None, *self._kernel(layer)[:-1])
            return self._hold(self._project(layer, x, dropout), "batch", None, None)
        split_time = self.splits_time(x)

        def local(x: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
            partial = apply(layer, x, self._whole_adapter(layer, arrays), gathering=self._gathering(layer))
            if split_time:
                return jax.lax.psum_scatter(partial, "model", scatter_dimension=1, tiled=True)
            return jax.lax.psum(partial, "model") if self._divides else partial

        return jax.shard_map(
            local,
            mesh=self._mesh,
            in_specs=(P("batch", None, *specs["kernel"][:-1]), self._array_specs([layer])[0]),
            out_specs=P("batch", "model" if split_time else None, None),
        )(x, arrays_of(layer))

    def apart(self, layer: Any, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Apply a small layer to activations (batch, length, ...) that are split over time, and stay so.

        Its arrays are gathered, which for many tokens is less than they are.
        """
        arrays = arrays_of(layer)
        if not kernel_of(layer).trainable and "kernel_scale" not in arrays:
            arrays["kernel"] = arrays["kernel"].astype(x.dtype)
        whole = {name: self._hold(array, *(None,) * array.ndim) for name, array in arrays.items()}
        return apply(layer, self._hold(x, "batch", "model", None), whole, dropout, divided=True)

    def _project(self, layer: Any, x: jax.Array, dropout: Dropout | None) -> jax.Array:
        """Apply a layer as XLA divides it, with its arrays whole over the batch axis."""
        arrays = arrays_of(layer)
        for name, placement in self._placements_of(layer).items():
            if placement.over_batch is not None:
                array = arrays[name] if name != "kernel" or kernel_of(layer).trainable else arrays[name].astype(x.dtype)
                arrays[name] = self._hold(array, *placement.used)
        return apply(layer, x, arrays, dropout, divided=self._divides)

    def _placements_of(self, layer: Any) -> dict[str, Placement]:
        """Return the specs of a layer's arrays, by their names."""
        paths = {name: f"{layer.path}/{name}" for name in KERNELS}
        return {name: self._placed[path] for name, path in paths.items() if path in self._placed}

    def _gathering(self, layer: Any) -> Gathering | None:
        """Return how a layer's kernel is gathered over the batch axis, or None."""
        dimension = self._placements_of(layer)["kernel"].over_batch
        return None if dimension is None else Gathering(dimension, self._again)

    def _whole_adapter(self, layer: Any, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Return a device's parts of a layer's arrays with the adapter's gathered over the batch axis: they are small.

        The way back of that sums their gradients and gives each device its part.
        """
        found = dict(arrays)
        for name, placement in self._placements_of(layer).items():
            if name != "kernel" and placement.over_batch is not None:
                found[name] = gathered(arrays[name], placement.over_batch, arrays[name].dtype)
        return found

    def _layer_specs(self, layer: Any) -> dict[str, tuple[Any, ...]] | None:
        """Return the specs of a layer's arrays as they are used, or None where XLA is to find its own way."""
        placed = self._placements_of(layer)
        # Of a mesh with one axis nothing is written out but the gathering over it.
        if not self._divides and ("kernel" not in placed or placed["kernel"].over_batch is None):
            return None
        specs = {name: placement.used for name, placement in placed.items()}
        if any("batch" in axes_of(axis) for spec in specs.values() for axis in spec):
            return None
        kernel = specs["kernel"]
        # A device's parts fit each other only where the adapter is split as its kernel is and has its rank whole; some
        # layouts replicate it, and a user's own may split the rank.
        if "lora_kernel_a" in specs and (specs["lora_kernel_a"], specs["lora_kernel_b"]) != (
            (*kernel[:-1], None),
            (None, kernel[-1]),
        ):
            return None
        return specs if not self._divides or any(axes_of(axis) for axis in kernel) else None

    def _kernel(self, layer: Any) -> tuple[Any, ...]:
        """Return how a layer's kernel is split over the model axis; activations have spent the batch axis already."""
        placed = self._placed.get(f"{layer.path}/kernel")
        spec = placed.used if placed else (None,) * len(kernel_of(layer).shape)
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

    def splits_time(self, x: jax.Array) -> bool:
        """Return whether hidden states (batch, length, hidden) between blocks are split over time."""
        return self._mesh is not None and self._divides and x.shape[1] % self._mesh.shape["model"] == 0

    def _array_specs(self, layers: Sequence[Any]) -> list[dict[str, P]]:
        return [{name: P(*self._placed[f"{layer.path}/{name}"].spec) for name in arrays_of(layer)} for layer in layers]


def _joins(
    layers: Sequence[Any], groups: Sequence[dict[str, jax.Array]], gatherings: Sequence[Gathering | None]
) -> bool:
    """Return whether the products of one input are worth a common way back: frozen ones with few heads per device."""
    kernels = [arrays["kernel"] for arrays in groups]
    return (
        all(kernel.ndim == 3 and jnp.issubdtype(kernel.dtype, jnp.floating) for kernel in kernels)
        and len({kernel.shape[-1] for kernel in kernels}) == 1
        and not any(kernel_of(layer).trainable for layer in layers)
        and not any(gatherings)
        and sum(kernel.shape[0] * kernel.shape[-1] for kernel in kernels) <= MOST_JOINED
    )


def _whole_heads(parts: Sequence[jax.Array]) -> list[jax.Array]:
    """Return queries, keys and values (batch, length, heads, head) from the parts of each head that devices have.

    One operation for the three: for single tokens its latency is all that it costs.
    """
    ends = list(itertools.accumulate(part.shape[2] for part in parts))
    joined = jax.lax.all_gather(jnp.concatenate(parts, 2), "model", axis=3, tiled=True, to="invarying")
    return jnp.split(joined, ends[:-1], axis=2)


def _narrow_everywhere(
    layers: Sequence[Any],
    x: jax.Array,
    groups: Sequence[dict[str, jax.Array]],
    specs: Sequence[dict[str, tuple[Any, ...]]],
) -> dict[str, jax.Array]:
    """Apply each adapter's A to a device's own positions, and exchange the results.

    Args:
        layers: those that share the input; those without an adapter are passed over.
        x: a device's positions (batch, length / devices, hidden).
        groups: a device's parts of each layer's arrays.
        specs: how these are split.

    Returns:
        By the layer's path, all positions (batch, length, ..., rank): of a device's own heads where heads are split
        over the axis, else of all.
    """
    exchanged: dict[str, jax.Array] = {}
    gathered: dict[str, jax.Array] = {}
    for layer, arrays, spec in zip(layers, groups, specs, strict=True):
        if "lora_kernel_a" not in arrays:
            continue
        a, by_heads = arrays["lora_kernel_a"], spec["lora_kernel_a"][0] is not None
        # Gather A (rank numbers per head) rather than the activations.
        whole = jax.lax.all_gather(a, "model", axis=0, tiled=True) if by_heads else a
        (exchanged if by_heads else gathered)[layer.path] = narrowed(layer, x, whole)
    devices = jax.lax.axis_size("model")
    found: dict[str, jax.Array] = {}
    # One operation for all adapters of a kind: on a small model its latency costs more than its bytes.
    if exchanged:
        parts = [each.reshape(*each.shape[:2], devices, -1) for each in exchanged.values()]
        mine = jax.lax.all_to_all(jnp.concatenate(parts, -1), "model", split_axis=2, concat_axis=1, tiled=True)
        shapes: dict[str, tuple[int, ...]] = {
            path: (each.shape[2] // devices, each.shape[3]) for path, each in exchanged.items()
        }
        found |= _apart(mine, shapes)
    if gathered:
        parts = [each.reshape(*each.shape[:2], -1) for each in gathered.values()]
        all_positions = jax.lax.all_gather(jnp.concatenate(parts, -1), "model", axis=1, tiled=True)
        found |= _apart(all_positions, {path: each.shape[2:] for path, each in gathered.items()})
    return found


def _apart(joined: jax.Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Take apart what was joined along the last dimension; the shapes are those after batch and time."""
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
    parts = jnp.split(joined, ends[:-1], axis=-1)
    return {
        path: part.reshape(*joined.shape[:2], *shape) for (path, shape), part in zip(shapes.items(), parts, strict=True)
    }
