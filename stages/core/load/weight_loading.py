"""From weight files straight into shards: no random values first, no whole copy of the model on the host.

Purpose: each device's slice is read (or dequantized), where `load.dtype` says so quantized, and put on that device, one
weight at a time.
Reads: the preset's files, and an adapter or full weights of a tuned variant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import keras
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stages.core.common.errors import StageError
from stages.core.load import quantizing
from stages.core.load.chosen_codes import ChosenCodes, Codes
from stages.core.presets.formats import WeightSource
from stages.core.sharding.keras_internals import place
from stages.core.sharding.layout import Placement, Weight
from stages.core.sharding.mesh import jax_mesh

Index = tuple[slice, ...]
# A variable that gets its value, and how that is split.
Filled = tuple[keras.Variable, NamedSharding]


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
    chosen: ChosenCodes | None = None,
) -> None:
    """Give every declared weight its value, split over the mesh as placed.

    Args:
        backbone: from `build_backbone`, its variables without values.
        placements: one for each of its weights.
        mesh: the Keras device mesh.
        source: returns the source that holds a weight path.
        progress: called with the bytes in place so far, after each weight.
        chosen: the codes that `quantize` chose; other 4-bit weights get the nearest codes.

    Raises:
        StageError: a weight in the file has another shape than the architecture says, is not of floats, or holds a
            NaN or an infinity.
    """
    done, devices = 0, jax_mesh(mesh)
    by_path = {placement.weight.path: placement for placement in placements}
    beside: dict[str, list[keras.Variable]] = {}
    for each in backbone.weights:
        if of := by_path[each.path].weight.scale_of:
            beside.setdefault(of, []).append(each)
    for variable in backbone.weights:
        placement = by_path[variable.path]
        if placement.weight.scale_of:
            continue
        origin = source(variable.path)
        shape = tuple(variable.shape)
        if origin.shape(variable.path) != shape:
            raise StageError(
                f"A weight must have the shape that the preset's architecture gives it: {variable.path} "
                f"{shape}. Received: shape={origin.shape(variable.path)} in the file."
            )
        sharding = NamedSharding(devices, PartitionSpec(*placement.spec))
        if of_codes := beside.get(variable.path):
            its = [(each, NamedSharding(devices, PartitionSpec(*by_path[each.path].spec))) for each in of_codes]
            if len(its) == 1:
                _fill_channels(origin, (variable, sharding), *its)
            elif chosen and variable.path in chosen:
                _fill_groups(functools.partial(chosen.read, variable.path), (variable, sharding), *its)
            else:
                _fill_groups(functools.partial(_nearest, origin, variable.path), (variable, sharding), *its)
            done += sum(by_path[each.path].weight.bytes for each in of_codes)
        else:
            read = functools.partial(_read, origin, variable.path, variable.dtype)
            parts = ((read(index), held_by) for index, held_by in _holders(sharding, shape))
            place(variable, _placed(parts, shape, sharding), sharding)
        if progress:
            done += placement.weight.bytes
            progress(done)


def _fill_channels(origin: WeightSource, of_codes: Filled, of_scale: Filled) -> None:
    """Quantize a weight while it is read, and give codes and scales their values: the same on every mesh.

    Of a matrix whose channels are split over devices all slices are held on the host until its scales are known.
    """
    (codes, codes_sharding), (scale, scale_sharding) = of_codes, of_scale
    shape, scale_shape = tuple(codes.shape), tuple(scale.shape)
    groups: dict[str, tuple[Index, list[tuple[Index, list[jax.Device]]]]] = {}
    for index, devices in _holders(codes_sharding, shape):
        channels = tuple(slice(None) if size == 1 else cut for size, cut in zip(scale_shape, index, strict=True))
        groups.setdefault(repr(channels), (channels, []))[1].append((index, devices))
    scales = np.empty(scale_shape, np.float32)

    def parts() -> Iterator[tuple[np.ndarray, list[jax.Device]]]:
        for channels, holders in groups.values():
            slices = [_read(origin, codes.path, "float32", index) for index, _ in holders]
            most = functools.reduce(np.maximum, (quantizing.largest(values, scale_shape) for values in slices))
            scales[channels] = quantizing.scales_of(most)
            for _, devices in holders:
                yield quantizing.codes(slices.pop(0), scales[channels]), devices

    place(codes, _placed(parts(), shape, codes_sharding), codes_sharding)
    held = ((np.ascontiguousarray(scales[index]), devices) for index, devices in _holders(scale_sharding, scale_shape))
    place(scale, _placed(held, scale_shape, scale_sharding), scale_sharding)


def _nearest(origin: WeightSource, path: str, index: Index) -> Codes:
    """Return the nearest codes of a slice of a weight, by groups."""
    return Codes(*quantizing.in_groups(_read(origin, path, "float32", index)))


def _fill_groups(read: Callable[[Index], Codes], *of_each: Filled) -> None:
    """Do the same with codes, scales and offsets by groups. A device has whole ones: what others have is not needed."""
    (codes, sharding), *_ = of_each
    shards: list[list[jax.Array]] = [[] for _ in of_each]
    for index, devices in _holders(sharding, tuple(codes.shape)):
        for held, values in zip(shards, read(index), strict=True):
            held += _on(devices, values)
    for (variable, sharding), held in zip(of_each, shards, strict=True):
        place(variable, jax.make_array_from_single_device_arrays(tuple(variable.shape), sharding, held), sharding)


def _holders(sharding: NamedSharding, shape: tuple[int, ...]) -> list[tuple[Index, list[jax.Device]]]:
    """Return the slices of a weight, each with the devices that hold it: several when an axis does not split it."""
    holders: dict[str, tuple[Index, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(repr(index), (index, []))[1].append(device)
    return list(holders.values())


def _read(origin: WeightSource, path: str, dtype: str, index: Index) -> np.ndarray:
    """Return a slice of a weight, checked.

    Raises:
        StageError: it is not of floats, or holds a NaN or an infinity.
    """
    values = np.asarray(origin.read(path, index))
    _refuse_codes(values, path)
    with np.errstate(over="ignore"):
        values = np.asarray(values.astype(dtype, copy=False), order="C")
    _refuse_non_finite(values, path)
    return values


def _placed(
    parts: Iterable[tuple[np.ndarray, list[jax.Device]]],
    shape: tuple[int, ...],
    sharding: NamedSharding,
) -> jax.Array:
    """Return a weight of slices, each on its devices."""
    shards: list[jax.Array] = []
    for values, devices in parts:
        shards += _on(devices, values)
        del values
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _on(devices: Sequence[jax.Device], values: np.ndarray) -> list[jax.Array]:
    """Return a slice on each of some devices.

    It is waited for, so that the host holds one slice at a time. An array that shared the host's memory would be
    copied by the first step that donates it, the whole model in one go: so it is copied now, slice by slice.
    """
    return jax.block_until_ready([jax.device_put(values, device, may_alias=False) for device in devices])


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
