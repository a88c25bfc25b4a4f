"""The 4-bit codes that `quantize` chose: written block by block, and read in slices while the base is loaded.

Writes and reads: `models/quantized/`: index.json and one safetensors file per block. Two neighbours in the last
dimension share a byte, the first in its lower half; scales and offsets are stored as the bits of bfloat16 numbers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from stages.core.common.errors import StageError, shown
from stages.core.common.paths import QUANTIZED, QUANTIZED_INDEX, Paths
from stages.core.files import atomic_path, sha256
from stages.core.load.arrays import write_arrays
from stages.core.load.quantizing import GROUP
from stages.core.records.quantize import QuantizedBase


class Codes(NamedTuple):
    """A kernel, or a slice of one: int4 codes, and bfloat16 scales and offsets per group of inputs."""

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray


def write_block(path: Path, kernels: dict[str, Codes]) -> str:
    """Write a block's codes by the paths of its kernels, atomically, and return the file's SHA-256.

    Raises:
        OSError: the disk is full, or the file cannot be written.
        ValueError: a kernel's last dimension is odd.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, each in kernels.items():
        if each.codes.shape[-1] % 2:
            raise ValueError(f"two codes share a byte: expected an even last dimension. Received: {each.codes.shape}")
        bits = each.codes.astype(np.int8).view(np.uint8) & 15
        arrays[name] = bits[..., ::2] | bits[..., 1::2] << 4
        arrays |= {f"{name}/{part}": getattr(each, part).view(np.uint16) for part in ("scale", "offset")}
    with atomic_path(path) as temporary:
        write_arrays(temporary, {name: arrays[name] for name in sorted(arrays)})
    return sha256(path)


class ChosenCodes:
    """The chosen codes of a base, by kernel path.

    Attributes:
        fingerprint: of all files; None if no codes were chosen: each weight is rounded to the nearest code.
    """

    def __init__(self, paths: Paths, base: str, dtype: str) -> None:
        """Read the index.

        Args:
            paths: of inputs and outputs.
            base: the preset's fingerprint.
            dtype: `load.dtype`.

        Raises:
            StageError: it is not there, or was made of another base or for another dtype.
        """
        index = QuantizedBase.read(paths, QUANTIZED_INDEX)
        if index.files and (index.base, index.dtype) != (base, dtype):
            raise StageError(
                f"{QUANTIZED}/ must have been made from this base, {base[:12]} in {dtype}. Received: "
                f"{str(index.base)[:12]} in {index.dtype}. Run `dvc repro quantize`."
            )
        self._folder, self._kernels = paths.read(QUANTIZED_INDEX).parent, frozenset(index.kernels)
        listed = "".join(f"{name} {digest}\n" for name, digest in sorted(index.files.items()))
        self.fingerprint = hashlib.sha256(listed.encode()).hexdigest() if index.files else None

    def __contains__(self, path: str) -> bool:
        """Return whether a kernel's codes were chosen."""
        return path in self._kernels

    def read(self, path: str, index: tuple[slice, ...]) -> Codes:
        """Return a slice of a kernel's codes, of whole groups, with their scales and offsets.

        Raises:
            StageError: the file is damaged.
        """
        *outer, inputs, outputs = index
        try:
            with safe_open(self._folder / _file(path), framework="numpy") as file:
                packed = file.get_slice(path)
                size = 2 * packed.get_shape()[-1]
                start, stop, _ = outputs.indices(size)
                some = packed[(*outer, inputs, slice(start // 2, -(-stop // 2)))]
                rows = packed.get_shape()[-2]
                first, last, _ = inputs.indices(rows)
                groups = (*outer, slice(first // GROUP, last // GROUP), slice(start, stop))
                scale, offset = (
                    file.get_slice(f"{path}/{part}")[groups].view(ml_dtypes.bfloat16) for part in ("scale", "offset")
                )
        except (OSError, SafetensorError, KeyError) as error:
            raise StageError(f"{QUANTIZED}/ must hold {path} ({shown(error)}). Run `dvc repro quantize`.") from error
        both = np.stack([some & 15, some >> 4], axis=-1).reshape(*some.shape[:-1], -1)
        codes = (both.astype(np.int8) ^ 8) - 8
        begin = start - 2 * (start // 2)
        return Codes(codes[..., begin : begin + stop - start].astype(ml_dtypes.int4), scale, offset)


def _file(path: str) -> str:
    """Return the name of the file that has a kernel's codes."""
    return f"{path.partition('/')[0]}.safetensors"
