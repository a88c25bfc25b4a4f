"""From weight files straight into shards: no random values first, no whole copy of the model on the host.

Purpose: each device's slice is read (or dequantized) and put on that device, one weight at a time.
Reads: the preset's files, and an adapter or full weights of a tuned variant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import keras
import ml_dtypes
import numpy as np

from stages.core.common.errors import StageError
from stages.core.presets.formats import WeightSource
from stages.core.sharding.keras_internals import place
from stages.core.sharding.layout import Placement, Weight


def weights_of(backbone: keras.Model) -> list[Weight]:
    """Return the declared weights, LoRA kernels included, for the layout engine."""
    return [
        Weight(
            variable.path,
            tuple(variable.shape),
            str(variable.dtype),
            "lora" if "lora_kernel" in variable.path else "weight",
        )
        for variable in backbone.weights
    ]


def fill(
    backbone: keras.Model,
    placements: Sequence[Placement],
    mesh: keras.distribution.DeviceMesh,
    source: Callable[[str], WeightSource],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Give every declared weight its value, split over the mesh as placed.

    Args:
        backbone: from `build_backbone`, its variables without values.
        placements: one for each of its weights.
        mesh: the Keras device mesh.
        source: returns the source that holds a weight path.
        progress: called with the bytes in place so far, after each weight.

    Raises:
        StageError: a weight in the file has another shape than the architecture says, is not of floats, or holds a
            NaN or an infinity.
    """
    done = 0
    by_path = {placement.weight.path: placement for placement in placements}
    for variable in backbone.weights:
        placement = by_path[variable.path]
        origin = source(variable.path)
        shape = tuple(variable.shape)
        if origin.shape(variable.path) != shape:
            raise StageError(
                f"A weight must have the shape that the preset's architecture gives it: {variable.path} "
                f"{shape}. Received: shape={origin.shape(variable.path)} in the file."
            )
        layout = keras.distribution.TensorLayout(placement.spec, mesh)
        # Several devices hold the same slice when an axis does not split it: it is read once.
        holders: dict[str, tuple[tuple[slice, ...], list[jax.Device]]] = {}
        for device, index in layout.backend_layout.addressable_devices_indices_map(shape).items():
            holders.setdefault(repr(index), (index, []))[1].append(device)
        shards = []
        for index, devices in holders.values():
            values = np.asarray(origin.read(variable.path, index))
            _refuse_codes(values, variable.path)
            with np.errstate(over="ignore"):
                values = np.asarray(values.astype(variable.dtype, copy=False), order="C")
            _refuse_non_finite(values, variable.path)
            # Waited for, so that the host holds one slice at a time. An array that shared the host's memory would be
            # copied by the first step that donates it, the whole model in one go: so it is copied now, slice by slice.
            held = [jax.device_put(values, device, may_alias=False) for device in devices]
            shards += jax.block_until_ready(held)
            del values
        value = jax.make_array_from_single_device_arrays(shape, layout.backend_layout, shards)
        place(variable, value, layout)
        if progress:
            done += placement.weight.bytes
            progress(done)


def _refuse_codes(values: np.ndarray, path: str) -> None:
    """Refuse whole numbers: the codes of a quantized weight are not its values."""
    if values.dtype.kind != "f" and values.dtype != ml_dtypes.bfloat16:
        raise StageError(f"The weights must be plain floats, not quantized. Received: {path} of {values.dtype}.")


def _refuse_non_finite(values: np.ndarray, path: str) -> None:
    """Refuse a weight with which every loss would be a NaN."""

    # A number is finite unless all bits of its exponent are set; looked at in pieces, so that no copy is made.
    bits, exponent = ("uint16", 0x7F80) if values.dtype.itemsize == 2 else ("uint32", 0x7F800000)
    flat: np.ndarray = values.reshape(-1)
    for start in range(0, flat.size, 1 << 20):
        part = flat[start : start + (1 << 20)]
        # A sum is finite only where all of its numbers are; where it is not, they may be large ones.
        with np.errstate(over="ignore", invalid="ignore"):
            if part.dtype == np.float32 and np.isfinite(part.sum()):
                continue
        if ((part.view(bits) & exponent) == exponent).any():
            raise StageError(
                f"Every weight must be finite. Received: a NaN or an infinity in {path} ({values.dtype}).\n"
                "The checkpoint is damaged, or its training diverged: take another one."
            )


class ArraySource:
    """A source over arrays in memory: first values of an adapter, or values read from safetensors."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        """Keep the arrays by weight path."""
        self._arrays = arrays

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight."""
        return self._arrays[path][index]

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the whole weight."""
        return self._arrays[path].shape
