"""Parts of arrays in safetensors files: written in one pass with their SHA-256, read slice by slice from any number.

Purpose: a process writes the parts that its devices hold, and one of another run reads just the slices that its own
need. The library's writer takes a second copy of everything in memory, and its reader knows no parts.
Source of the format: https://huggingface.co/docs/safetensors: 8 bytes with the length of the JSON that follows (name to
dtype, shape and place), then the values. `__metadata__` says of each tensor of which array it is a part, and where.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype("f8"),
    "F32": np.dtype("f4"),
    "F16": np.dtype("f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("i8"),
    "I32": np.dtype("i4"),
    "U32": np.dtype("u4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes that are hashed and written at once.
BLOCK = 1 << 24

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """A part of an array on the host: where it begins in the array of the shape `whole`, and its values."""

    name: str
    start: tuple[int, ...]
    whole: tuple[int, ...]
    values: np.ndarray

    @classmethod
    def of_all(cls, name: str, values: np.ndarray) -> Piece:
        """Return a whole array as a piece."""
        return cls(name, (0,) * values.ndim, values.shape, values)

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or infinite; float16 and bfloat16 are looked at in float32, a block at a time."""
        if self.values.dtype.kind in "biu":
            return True
        flat = self.values.reshape(-1)
        blocks = range(0, flat.size, BLOCK)
        return all(np.isfinite(flat[at : at + BLOCK].astype(np.float32, copy=False)).all() for at in blocks)


def write_pieces(path: Path, pieces: Sequence[Piece]) -> str:
    """Write a file, not atomic by itself, and return its SHA-256.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    header: dict[str, object] = {}
    about, end = {}, 0
    for number, piece in enumerate(pieces):
        start, end = end, end + piece.values.nbytes
        key = f"{number}:{piece.name}"
        about[key] = json.dumps({"array": piece.name, "start": piece.start, "of": piece.whole})
        header[key] = {
            "dtype": NAMES[piece.values.dtype],
            "shape": piece.values.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps({"__metadata__": about, **header}, separators=(",", ":")).encode()
    # The values begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as stream:

        def put(block: bytes | memoryview) -> None:
            digest.update(block)
            stream.write(block)

        put(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            content = np.ascontiguousarray(piece.values).reshape(-1).view(np.uint8).data
            for at in range(0, len(content), BLOCK):
                put(content[at : at + BLOCK])
    return digest.hexdigest()


@dataclass(frozen=True)
class _Stored:
    """A piece in a file: its place in the array, and in the file from a number of bytes on."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path
    offset: int


class PieceFiles:
    """The arrays in some files of pieces, none of which is in memory."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers.

        Raises:
            OSError: a file cannot be read.
            ValueError: one is no file of pieces.
        """
        self._pieces: dict[str, list[_Stored]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            for key, about in header.pop("__metadata__").items():
                told, entry = json.loads(about), header[key]
                self.shapes[told["array"]] = tuple(told["of"])
                self._pieces.setdefault(told["array"], []).append(
                    _Stored(
                        tuple(told["start"]),
                        tuple(entry["shape"]),
                        DTYPES[entry["dtype"]],
                        path,
                        8 + length + entry["data_offsets"][0],
                    )
                )

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Return an array, or a slice of it (steps of 1); only the bytes of the slice are read.

        Raises:
            ValueError: the files have not all of it.
            OSError: one cannot be read.
        """
        pieces, whole = self._pieces.get(name, []), self.shapes.get(name, ())
        wanted = [cut.indices(size)[:2] for cut, size in zip(index or (slice(None),) * len(whole), whole, strict=True)]
        found = np.empty([stop - start for start, stop in wanted], pieces[0].dtype if pieces else np.uint8)
        filled = 0
        for piece in pieces:
            ends = zip(wanted, piece.start, piece.shape, strict=True)
            # What the slice and the piece have in common, counted within the whole array.
            common = [(max(a, start), min(b, start + size)) for (a, b), start, size in ends]
            if any(a >= b for a, b in common):
                continue
            into = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(common, wanted, strict=True))
            taken = tuple(slice(a - first, b - first) for (a, b), first in zip(common, piece.start, strict=True))
            # A mapping of its own, since what was read of one stays in this process's memory as long as it is there.
            values = np.memmap(piece.path, piece.dtype, "r", piece.offset, piece.shape)
            found[into] = values[taken]
            filled += math.prod(b - a for a, b in common)
        if not pieces or filled != found.size:
            raise ValueError(f"{name} is not there as a whole: {filled} of {found.size} values")
        return found
