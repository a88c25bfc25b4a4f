"""Reading the weights of a Gemma from a GGUF file as keras-hub names and shapes them.

Purpose: the embedded model is a quantized GGUF, and so is what `export` writes for llama.cpp; the pipeline knows only
keras-hub's backbones. Weights are dequantized one at a time, so that loading needs the memory of one of them, not of
the model.
Reads: the one .gguf file of a folder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from stages.core.common.errors import StageError, shown
from stages.core.presets.architecture import Architecture
from stages.core.presets.gguf_architecture import TABLE, architecture_of
from stages.core.presets.gguf_file import only_file, open_file
from stages.core.presets.gguf_gemma4 import FACTORS
from stages.core.presets.weight_table import weight_table

CHUNK_ELEMENTS = 1 << 19
"""Values dequantized at a time by a thread: their temporaries (some 8 MB) still fit in a core's cache."""

HEAD = "output.weight"


def needed_files(folder: Path) -> list[str]:
    """Return the name of the only file."""
    return [only_file(folder).name]


def open_weights(folder: Path, architecture: Architecture) -> contextlib.nullcontext[GgufSource]:
    """Return the weights, for a `with` block; the file itself gives the architecture."""
    return contextlib.nullcontext(GgufSource(GgufWeights(only_file(folder))))


def check_weights(folder: Path, architecture: Architecture) -> None:
    """Check that the file holds the architecture's weights and nothing else, without reading a weight.

    Raises:
        StageError: names the tensor that does not fit.
    """
    GgufWeights(only_file(folder))


class _Weight(NamedTuple):
    """Where a Keras weight comes from, and how."""

    tensor: gguf.ReaderTensor
    shape: tuple[int, ...]
    kind: str


class GgufWeights:
    """The weights of a Gemma's GGUF file under keras-hub's weight paths and in its shapes, read one at a time.

    Raises:
        StageError: the file is not a complete GGUF of a Gemma.
    """

    def __init__(self, path: Path) -> None:
        """Open the file (memory-mapped) and check that every weight is there; no weight is read yet."""
        reader = open_file(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._weights: dict[str, _Weight] = {}
        architecture = architecture_of(reader, path)
        for weight_path, stored in weight_table(architecture).items():
            name, shape, kind = stored.gguf, stored.shape, stored.kind
            if (tensor := tensors.get(name)) is None:
                raise StageError(f"The GGUF file must hold {name} (for {weight_path}). Received: path={path}")
            # GGUF states the axis first that runs fastest.
            if tensor.shape.tolist() != list(stored.matrix_shape[::-1]):
                raise StageError(
                    f"The GGUF tensor {name} must have the values of shape {shape} (for {weight_path}). "
                    f"Received: shape={tuple(int(size) for size in tensor.shape)} in {path}"
                )
            if tensor.tensor_type.name.startswith("I") and not tensor.tensor_type.name.startswith("IQ"):
                raise StageError(
                    f"The GGUF tensor {name} must be of floats. Received: {tensor.tensor_type.name} in {path}"
                )
            self._weights[weight_path] = _Weight(tensor, shape, kind)
        table, head = self._weights["token_embedding/embeddings"].tensor, tensors.get(HEAD)
        if head is not None and (head.tensor_type != table.tensor_type or not np.array_equal(head.data, table.data)):
            raise StageError(
                f"The language head must be the embedding table, as in every Gemma. Received: {HEAD} in {path}, which "
                f"differs from {TABLE}"
            )
        known = {HEAD, *(weight.tensor.name for weight in self._weights.values())}
        if architecture.class_name == "Gemma4Backbone":
            known.add(FACTORS)
        if unknown := tensors.keys() - known:
            raise StageError(
                "The GGUF file holds a tensor that a text Gemma does not have. "
                f"Received: {shown(min(unknown))} in {path}"
            )

    def paths(self) -> list[str]:
        """Return the Keras weight paths, in the order of `backbone.weights`."""
        return list(self._weights)

    def shape(self, path: str) -> tuple[int, ...]:
        """Return a weight's Keras shape, without reading it."""
        return self._weights[path].shape

    def read(self, path: str, rows: slice | None = None) -> np.ndarray:
        """Return a weight in float32 and in Keras' shape, contiguous.

        Args:
            path: a Keras weight path, one of `paths()`.
            rows: a slice (step 1) of the leading Keras axis. Only what it covers is dequantized (and, where that axis
                runs along a GGUF row, the rest of the quantization blocks at its ends).
        """
        tensor, shape, kind = self._weights[path]
        if kind == "scalar":
            return _dequantize(np.asarray(tensor.data).view(np.uint8)[None], tensor.tensor_type).reshape(())
        start, stop, step = (rows or slice(None)).indices(shape[0])
        if step != 1:
            raise ValueError(f"rows must be a slice with step 1. Received: rows={rows}")
        stop = max(start, stop)
        # (GGUF rows, bytes per row), whatever the type; a vector has one value per row.
        data = np.asarray(tensor.data).view(np.uint8)
        if kind.startswith("experts"):
            return np.ascontiguousarray(_of_experts(data[start:stop], tensor.tensor_type, kind, shape))
        data = data.reshape(shape[0], -1) if data.ndim == 1 else data
        along_rows, values_per_step = _LEADING_AXIS[kind](shape)
        first, last = start * values_per_step, stop * values_per_step
        if along_rows:
            values = _dequantize(data[first:last], tensor.tensor_type)
        else:
            block_values, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
            first_block, last_block = first // block_values, -(-last // block_values)
            values = _dequantize(data[:, first_block * block_bytes : last_block * block_bytes], tensor.tensor_type)
            values = values[:, first - first_block * block_values : last - first_block * block_values]
        return np.ascontiguousarray(_to_keras(values, kind, shape))


class GgufSource:
    """Slices of a GGUF file's weights: quantized rows are read alone, other slices are cut from the whole weight."""

    def __init__(self, weights: GgufWeights) -> None:
        """Keep at most one whole weight at a time."""
        self._weights = weights
        self._whole: tuple[str, np.ndarray] | None = None

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight as float32; of a single number it is ()."""
        shape = self.shape(path)
        if not shape:
            return self._weights.read(path)
        if all(cut.indices(size) == (0, size, 1) for cut, size in zip(index[1:], shape[1:], strict=True)):
            return self._weights.read(path, index[0])
        # A weight split over another axis is cut several times in a row: dequantize it once.
        if self._whole is None or self._whole[0] != path:
            self._whole = (path, self._weights.read(path))
        return self._whole[1][index]

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the whole weight."""
        return self._weights.shape(path)


_LEADING_AXIS: dict[str, Callable[[tuple[int, ...]], tuple[bool, int]]] = {
    "scale": lambda shape: (True, 1),
    "vector": lambda shape: (True, 1),
    "rows": lambda shape: (True, 1),
    "heads_out": lambda shape: (True, shape[2]),
    "heads_in": lambda shape: (False, shape[1]),
    "transposed": lambda shape: (False, 1),
}
"""For each kind of conversion: whether the leading Keras axis runs over GGUF's rows (else along a row), and how many
rows or values one step of it takes."""


def _to_keras(values: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return GGUF values (PyTorch's order of a linear layer: outputs x inputs) as a Keras weight.

    Args:
        values: rows or columns of the tensor that belong to whole steps of the leading Keras axis.
        kind: of the conversion, as in `weight_table`.
        shape: of the whole Keras weight; the result has fewer entries in its leading axis where `values` is a part.
    """
    if kind == "scale":
        # llama.cpp multiplies by the stored scale, Keras by one plus the scale.
        return values[:, 0] - np.float32(1)
    if kind == "vector":
        return values[:, 0]
    if kind == "heads_out":
        _, hidden, head_dim = shape
        return values.reshape(-1, head_dim, hidden).transpose(0, 2, 1)
    if kind == "heads_in":
        _, head_dim, hidden = shape
        return values.reshape(hidden, -1, head_dim).transpose(1, 2, 0)
    return values.T if kind == "transposed" else values


def _of_experts(
    data: np.ndarray, quantization: gguf.GGMLQuantizationType, kind: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Return the values of some experts as a Keras weight (experts, inputs, outputs).

    Args:
        data: (experts, outputs, bytes) uint8; gates and the other matrices that take hidden states are the first and
            second half of the outputs of one tensor.
        quantization: the tensor's type.
        kind: which of them, as in `weight_table`.
        shape: of the whole Keras weight.
    """
    _, inputs, outputs = shape
    start = outputs if kind == "experts_up" else 0
    rows = data[:, start : start + outputs].reshape(-1, data.shape[-1])
    return _dequantize(rows, quantization).reshape(-1, outputs, inputs).transpose(0, 2, 1)


def _dequantize(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return the float32 values of GGUF rows, (rows, bytes) uint8, as (rows, values).

    The package works on 16 rows at a time and joins the results at the end, which takes the embedding 2.6 s and twice
    its memory; its per-block functions on larger pieces, in threads (numpy lets go of the lock), take 0.1 s.
    """
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_count, columns = data.shape[0], data.shape[1] // block_bytes * block_values
    values = np.empty((row_count, columns), np.float32)
    if not values.size:
        return values
    step = max(1, CHUNK_ELEMENTS // columns)
    # The types that are not called Q... are plain floats, or need the tables that only the package's own entry sets up.
    per_block = getattr(gguf.quants, kind.name).dequantize_blocks if kind.name.startswith("Q") else None

    def piece(start: int) -> None:
        blocks = data[start : start + step].reshape(-1, block_bytes)
        part = per_block(blocks) if per_block else gguf.dequantize(blocks, kind)
        values[start : start + step] = part.reshape(-1, columns)

    if row_count <= step:
        piece(0)
        return values
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(piece, range(0, row_count, step)))
    return values
