"""Reading Gemma 3 from a GGUF file as keras-hub names and shapes it: architecture and weights.

Purpose: the embedded model is a quantized GGUF; the pipeline knows only keras-hub's `Gemma3Backbone`. Weights are
dequantized one at a time, so that loading needs the memory of one of them, not of the model.
Reads: the one .gguf file of a folder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from stages.core.common.errors import StageError, shown
from stages.core.presets.architecture import Architecture
from stages.core.presets.gguf_file import field_of, only_file, open_file
from stages.core.presets.untrusted import brief
from stages.core.presets.weight_table import weight_table

CHUNK_ELEMENTS = 1 << 19
"""Values dequantized at a time by a thread: their temporaries (some 8 MB) still fit in a core's cache."""

GLOBAL_ROPE_WAVELENGTH = 1.0e6
"""keras-hub's Gemma3Backbone has it as a constant for its global layers (and 1.0e4 for the local ones)."""

TABLE, HEAD = "token_embd.weight", "output.weight"


def read_architecture(folder: Path) -> Architecture:
    """Return the architecture of the .gguf file of a folder.

    Raises:
        StageError: there is not one such file, it is not a Gemma 3 GGUF, lacks a hyper-parameter, or has one that
            keras-hub cannot express.
    """
    path = only_file(folder)
    return _architecture(open_file(path), path)


def _architecture(reader: gguf.GGUFReader, path: Path) -> Architecture:
    """Return the architecture of an open file (`path` for messages)."""

    def need(key: str) -> Any:
        value = field_of(reader, f"gemma3.{key}")
        if value is None:
            raise StageError(f"The GGUF file must state gemma3.{key}, and does not. Received: path={path}")
        return value

    wavelength = need("rope.freq_base")
    if wavelength != GLOBAL_ROPE_WAVELENGTH:
        raise StageError(
            f"keras-hub's Gemma 3 has a fixed global RoPE wavelength of {GLOBAL_ROPE_WAVELENGTH:g}. "
            f"Received: gemma3.rope.freq_base={brief(wavelength)} in {path}"
        )
    if need("attention.key_length") != need("attention.value_length"):
        raise StageError(f"Keys and values must have the same head size. Received: path={path}")
    names = {tensor.name: tensor for tensor in reader.tensors}
    if TABLE not in names or len(names[TABLE].shape) != 2:
        raise StageError(f"The GGUF file must hold {TABLE}, and does not. Received: path={path}")
    epsilon = need("attention.layer_norm_rms_epsilon")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise StageError(f"The GGUF file must state a small epsilon. Received: {brief(epsilon)} in {path}")
    config = {
        # Of the tensor, not of the token list: some files pad one and not the other.
        "vocabulary_size": int(names[TABLE].shape[1]),
        "image_size": 896,
        "num_layers": need("block_count"),
        "num_query_heads": need("attention.head_count"),
        "num_key_value_heads": need("attention.head_count_kv"),
        "hidden_dim": need("embedding_length"),
        "intermediate_dim": need("feed_forward_length"),
        "head_dim": need("attention.key_length"),
        "query_head_dim_normalize": True,
        "use_query_key_norm": "blk.0.attn_q_norm.weight" in names,
        "use_post_ffw_norm": "blk.0.post_ffw_norm.weight" in names,
        "use_post_attention_norm": "blk.0.post_attention_norm.weight" in names,
        "attention_logit_soft_cap": field_of(reader, "gemma3.attn_logit_softcapping"),
        "final_logit_soft_cap": field_of(reader, "gemma3.final_logit_softcapping"),
        "use_sliding_window_attention": True,
        "sliding_window_size": need("attention.sliding_window"),
        "local_rope_scaling_factor": 1.0,
        "global_rope_scaling_factor": field_of(reader, "gemma3.rope.scaling.factor", 1.0),
        "vision_encoder": None,
        # Stored as float32: 9.999999974752427e-07 was written as 1e-06.
        "layer_norm_epsilon": float(str(np.float32(epsilon))),
        "dropout": 0,
    }
    for key in ("num_layers", "num_query_heads", "num_key_value_heads", "hidden_dim", "intermediate_dim", "head_dim"):
        value = config[key]
        # Every block has tensors, so there are fewer blocks.
        if not isinstance(value, int) or not 1 <= value <= (len(names) if key == "num_layers" else 1 << 22):
            raise StageError(f"The GGUF file must state sizes of a Gemma 3. Received: {key}={brief(value)} in {path}")
    return Architecture("Gemma3Backbone", config)


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
    """The weights of a Gemma 3 GGUF file under keras-hub's weight paths and in its shapes, read one at a time.

    Raises:
        StageError: the file is not a complete Gemma 3 GGUF.
    """

    def __init__(self, path: Path) -> None:
        """Open the file (memory-mapped) and check that every weight is there; no weight is read yet."""
        reader = open_file(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._weights: dict[str, _Weight] = {}
        for weight_path, stored in weight_table(_architecture(reader, path)).items():
            name, shape, kind = stored.gguf, stored.shape, stored.kind
            if name not in tensors:
                raise StageError(f"The GGUF file must hold {name} (for {weight_path}). Received: path={path}")
            tensor = tensors.pop(name)
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
        table, head = self._weights["token_embedding/embeddings"].tensor, tensors.pop(HEAD, None)
        if head is not None and (head.tensor_type != table.tensor_type or not np.array_equal(head.data, table.data)):
            raise StageError(
                f"The language head must be the embedding table, as in every Gemma. Received: {HEAD} in {path}, which "
                f"differs from {TABLE}"
            )
        if tensors:
            raise StageError(
                "The GGUF file holds a tensor that a text Gemma 3 does not have. "
                f"Received: {shown(min(tensors))} in {path}"
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
        start, stop, step = (rows or slice(None)).indices(shape[0])
        if step != 1:
            raise ValueError(f"rows must be a slice with step 1. Received: rows={rows}")
        stop = max(start, stop)
        # (GGUF rows, bytes a row), whatever the type; a vector is one value a row.
        data = np.asarray(tensor.data).view(np.uint8)
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


_LEADING_AXIS: dict[str, Callable[[tuple[int, ...]], tuple[bool, int]]] = {
    "scale": lambda shape: (True, 1),
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
    if kind == "heads_out":
        _, hidden, head_dim = shape
        return values.reshape(-1, head_dim, hidden).transpose(0, 2, 1)
    if kind == "heads_in":
        _, head_dim, hidden = shape
        return values.reshape(hidden, -1, head_dim).transpose(1, 2, 0)
    return values.T if kind == "transposed" else values


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

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(piece, range(0, row_count, step)))
    return values
