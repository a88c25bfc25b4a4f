"""Writing safetensors files tensor by tensor: the library's own writer takes all of a file's tensors at once.

Source of the format: https://huggingface.co/docs/safetensors: 8 bytes with the length of the JSON that follows (name to
dtype, shape and place), then the values.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from stages.core.files import atomic_path, write_json
from stages.core.presets.safetensors import INDEX, SINGLE

DTYPES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}
LARGEST_FILE = 5 * 10**9
"""Bytes of a file where there are several, as `save_pretrained` of transformers had it for years."""

Shape = tuple[int, ...]


def write_safetensors(
    path: Path, shapes: Mapping[str, Shape], dtype: np.dtype, tensors: Iterator[tuple[str, np.ndarray]]
) -> None:
    """Write a file atomically; the same tensors give the same bytes.

    Args:
        path: of the file.
        shapes: of each tensor by name, in the order in which they come.
        dtype: of all of them: float32 or bfloat16.
        tensors: name and values; as many are taken as there are shapes.

    Raises:
        OSError: the disk is full, or the file cannot be written.
        RuntimeError: internal error: a tensor is not the one that the shapes announce.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # The values begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), (given, values) in zip(shapes.items(), itertools.islice(tensors, len(shapes)), strict=True):
            if (name, shape, dtype) != (given, values.shape, values.dtype):
                raise RuntimeError(f"{name} {shape} {dtype} was announced, {given} {values.shape} {values.dtype} came")
            stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
            del values


def write_model(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: np.dtype,
    tensors: Iterable[tuple[str, np.ndarray]],
    largest: int = LARGEST_FILE,
) -> None:
    """Write a model's weights into one file, or into several with an index where one would exceed `largest` bytes."""
    parts: list[dict[str, Shape]] = [{}]
    total = size = 0
    for name, shape in shapes.items():
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if parts[-1] and size + count > largest:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += count
        total += count
    stream = iter(tensors)
    if len(parts) == 1:
        write_safetensors(folder / SINGLE, parts[0], dtype, stream)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_safetensors(folder / name, part, dtype, stream)
        weight_map |= dict.fromkeys(part, name)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
