"""A model as a GGUF file, which llama.cpp and what is built on it run.

Purpose: what llama.cpp's own converter would write, without a copy of the model in memory: tensors come one after the
other and are converted in pieces on their way to the file.
Writes: one .gguf file. Source of names, keys and types: llama.cpp's `conversion/gemma.py`.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from stages.core.common.errors import StageError
from stages.core.export.gguf_metadata import add_sizes, architecture_name
from stages.core.export.gguf_vocabulary import add_vocabulary
from stages.core.export.tensors import PREFIX
from stages.core.files import atomic_path
from stages.core.presets.architecture import Architecture
from stages.core.presets.gguf_gemma4 import FACTORS, rope_factors
from stages.core.presets.weight_table import StoredWeight, weight_table
from stages.core.records.manifest import License

FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
"""By the name of `export.gguf_type`."""

CHUNK_ELEMENTS = 1 << 19
"""Values converted at a time by a thread: their temporaries (some 8 MB) still fit in a core's cache."""

THREADS = 4

ROUTER = "ffn_gate_inp.weight"
"""Stays in float32, as in llama.cpp's converter: its rounding could change which experts a token is sent to."""


def in_float32(weight: StoredWeight) -> bool:
    """Return whether a weight stays float32, whatever the type of the matrices: vectors, and routers."""
    return len(weight.matrix_shape) == 1 or weight.gguf.endswith(ROUTER)


def write_gguf(
    target: Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, np.ndarray]],
    vocabulary: Any,
    kind: str,
    *,
    name: str,
    terms: License,
    chat_template: str | None = None,
) -> None:
    """Write a model, atomically; what it needs is the memory of one tensor.

    Args:
        target: the .gguf file.
        architecture: of the preset.
        tensors: each of the model's weights by its Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), as a
            matrix outputs x inputs, norms without the one that Gemmas before 4 add; in the order of `weight_table`.
        vocabulary: of the preset, as a SentencePiece `ModelProto` (`vocabulary.sentencepiece_model`).
        kind: of the matrices: F32, F16, BF16 or Q8_0. Vectors and routers are F32, as llama.cpp wants them; a matrix's
            rows are F16 where Q8_0's blocks of 32 do not divide them.
        name: shown by what reads the file.
        terms: that the weights come under.
        chat_template: Jinja, for instruct presets.

    Raises:
        StageError: llama.cpp cannot express the model, or a weight is beyond float16's 65504 with kind F16.
        ValueError: a tensor is missing, or comes out of order or in another shape.
    """
    family = architecture_name(architecture)
    # Two weights of a block's experts share a tensor.
    table = list({weight.gguf: weight for weight in weight_table(architecture).values()}.values())
    full = [each for each in architecture.kinds if each.window is None] if family == "gemma4" else []
    with atomic_path(target) as temporary:
        writer = quiet_writer(temporary, family)
        writer.add_type("model")
        writer.add_name(name)
        writer.add_license_name(terms.name)
        writer.add_license_link(terms.url)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_sizes(writer, family, architecture)
        rows = architecture.config["vocabulary_size"]
        add_vocabulary(writer, vocabulary, rows, chat_template, by_merges=family == "gemma4")
        factors = rope_factors(full[0]) if full else np.empty(0, np.float32)
        if full:
            writer.add_tensor_info(FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for weight in table:
            _declare(writer, weight, kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            stream = writer.fout[0]
            writer.write_padding(stream, stream.tell())
            stream.write(factors.data)
            writer.write_padding(stream, factors.nbytes)
            _write_values(writer, table, tensors, kind)
        finally:
            writer.close()


def _write_values(
    writer: gguf.GGUFWriter, table: Sequence[StoredWeight], tensors: Iterable[tuple[str, np.ndarray]], kind: str
) -> None:
    """Write the values of all tensors, each padded to the format's alignment."""
    stream = writer.fout[0]
    left = list(reversed(table))
    for name, values in tensors:
        weight = left.pop() if left else None
        if weight is None or name != PREFIX + weight.hugging_face or values.shape != weight.matrix_shape:
            raise ValueError(f"expected {weight}. Received: {name} {values.shape}")
        written = 0
        for part in _encoded(values, weight, kind):
            # Not numpy's `tofile`, whose error does not say that the disk is full.
            stream.write(part.data)
            written += part.nbytes
        writer.write_padding(stream, written)
        # Let go of before the next is made.
        del values
    if left:
        raise ValueError(f"expected {left[-1]}. Received: no more tensors")


class _Writer(gguf.GGUFWriter):
    """The package's writer, which takes seconds over 262,144 tokens, value by value: here an array is packed whole."""

    def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
        kinds = {type(item) for item in val} if isinstance(val, list) else set()
        if sub_type is not None or kinds not in ({str}, {int}, {float}):
            return super()._pack_val(val, vtype, add_vtype, sub_type)
        # The head, the element's type and the count of one, is that of an array of the first value.
        if kinds == {str}:
            packed = [struct.pack("<Q", len(text)) + text for text in (item.encode() for item in val)]
        else:
            packed = [struct.pack("<i" if kinds == {int} else "<f", item) for item in val]
        first = super()._pack_val(val[:1], vtype, add_vtype)
        return first[: -len(packed[0]) - 8] + struct.pack("<Q", len(val)) + b"".join(packed)


def quiet_writer(path: Path, family: str) -> gguf.GGUFWriter:
    """Return the writer, without what it logs through the root logger's handlers."""
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return _Writer(path, family)


def _kind_of(weight: StoredWeight, kind: str) -> gguf.GGMLQuantizationType:
    """Return the type that a weight is written in."""
    if in_float32(weight):
        return gguf.GGMLQuantizationType.F32
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    return gguf.GGMLQuantizationType[kind if weight.matrix_shape[-1] % block == 0 else "F16"]


def _declare(writer: gguf.GGUFWriter, weight: StoredWeight, kind: str) -> None:
    """State a tensor's name, shape, type and size, which come before all values."""
    its_kind, shape = _kind_of(weight, kind), weight.matrix_shape
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[its_kind]
    size = math.prod(shape) // block_values * block_bytes
    writer.add_tensor_info(weight.gguf, shape, np.dtype(np.float32), size, raw_dtype=its_kind)


def _encoded(values: np.ndarray, weight: StoredWeight, kind: str) -> Iterator[np.ndarray]:
    """Yield a tensor's values as the file has them, piece by piece."""
    if len(values.shape) == 1:
        # llama.cpp multiplies by what the file holds, Gemmas before 4 by one more than their scales.
        yield values.astype(np.float32) + np.float32(weight.kind == "scale")
        return
    its_kind = _kind_of(weight, kind)
    # Experts one below the other.
    values = values.reshape(-1, values.shape[-1])
    step = max(1, CHUNK_ELEMENTS // values.shape[1])

    def piece(start: int) -> np.ndarray:
        part = np.ascontiguousarray(values[start : start + step], np.float32)
        encoded = _encode(part, its_kind)
        if its_kind == gguf.GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
            raise StageError(
                f"float16 holds numbers up to 65504. Received: one beyond in {weight.gguf}\n"
                "Set export.gguf_type to BF16."
            )
        return encoded

    starts = range(0, values.shape[0], step)
    with ThreadPoolExecutor(THREADS) as threads:
        # In groups: all at once would hold the whole tensor a second time.
        for first in range(0, len(starts), 2 * THREADS):
            yield from threads.map(piece, starts[first : first + 2 * THREADS])


def _encode(part: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return rows of float32 in a type of the file.

    The package's own entry works on 16 rows at a time; its function for blocks takes any number.
    """
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        with np.errstate(over="ignore"):
            return gguf.quantize(part, kind)
    block_values, _ = gguf.GGML_QUANT_SIZES[kind]
    return getattr(gguf.quants, kind.name).quantize_blocks(part.reshape(-1, block_values))
