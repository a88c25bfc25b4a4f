"""From weight files straight into shards: no random values first, no whole copy of the model on the host.

Purpose: each device's slice is read (or dequantized) and put on that device, one weight at a time.
Reads: the preset's files, and an adapter or full weights of a tuned variant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stages.core.common.errors import StageError
from stages.core.sharding.layout import Placement, Weight

if TYPE_CHECKING:
    import keras
    import numpy as np

    from stages.core.presets.architecture import Architecture
    from stages.core.presets.gguf import GgufWeights


class WeightSource(Protocol):
    """Anything that hands out slices of weights by path."""

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight."""

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the whole weight."""


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


@contextlib.contextmanager
def open_source(folder: Path, file_format: str, architecture: Architecture) -> Iterator[WeightSource]:
    """Open a preset's weights.

    Raises:
        StageError: they are not those of the architecture.
    """
    if file_format == "gguf":
        from stages.core.presets.gguf import GgufWeights

        yield GgufSource(GgufWeights(next(folder.glob("*.gguf"))))
    elif file_format == "safetensors":
        from stages.core.presets.safetensors import SafetensorsWeights

        with contextlib.closing(SafetensorsWeights(folder)) as source:
            yield source
    else:
        from stages.core.presets.keras_h5 import KerasWeights

        with KerasWeights(folder, architecture) as source:
            yield source


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
        source: tells which source holds a weight path.
        progress: called with the bytes in place so far, after each weight.

    Raises:
        StageError: a weight in the file has another shape than the architecture says, is not of floats, or holds a
            NaN or an infinity.
    """
    import jax
    import keras
    import numpy as np

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
                values = np.ascontiguousarray(values.astype(variable.dtype, copy=False))
            _refuse_non_finite(values, variable.path)
            # Waited for, so that the host holds one slice at a time. An array that shared the host's memory would be
            # copied, all of the model at once, by the first step that donates it: so it is copied now, bit by bit.
            held = [jax.device_put(values, device, may_alias=False) for device in devices]
            shards += jax.block_until_ready(held)
            del values
        value = jax.make_array_from_single_device_arrays(shape, layout.backend_layout, shards)
        # The layout is what Keras consults when it derives others from it: optimizer slots get their weight's.
        variable._layout = layout
        variable._value = value
        variable._initializer = None
        if progress:
            done += placement.weight.bytes
            progress(done)


def _refuse_codes(values: np.ndarray, path: str) -> None:
    """Refuse whole numbers: the codes of a quantized weight are not its values."""
    import ml_dtypes

    if values.dtype.kind != "f" and values.dtype != ml_dtypes.bfloat16:
        raise StageError(f"The weights must be plain floats, not quantized. Received: {path} of {values.dtype}.")


def _refuse_non_finite(values: np.ndarray, path: str) -> None:
    """Refuse a weight with which every loss would be a NaN."""

    # A number is finite unless all bits of its exponent are set; looked at in pieces, so that no copy is made.
    bits, exponent = ("uint16", 0x7F80) if values.dtype.itemsize == 2 else ("uint32", 0x7F800000)
    flat: np.ndarray = values.reshape(-1).view(bits)
    for start in range(0, flat.size, 1 << 20):
        if ((flat[start : start + (1 << 20)] & exponent) == exponent).any():
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


class GgufSource:
    """Slices of a GGUF file's weights: quantized rows are read alone, other slices are cut from the whole weight."""

    def __init__(self, weights: GgufWeights) -> None:
        """Keep at most one whole weight at a time."""
        self._weights = weights
        self._whole: tuple[str, np.ndarray] | None = None

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight as float32."""
        shape = self.shape(path)
        if all(cut.indices(size) == (0, size, 1) for cut, size in zip(index[1:], shape[1:], strict=True)):
            return self._weights.read(path, index[0])
        # A weight split over another axis is cut several times in a row: dequantize it once.
        if self._whole is None or self._whole[0] != path:
            self._whole = (path, self._weights.read(path))
        return self._whole[1][index]

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the whole weight."""
        return self._weights.shape(path)
