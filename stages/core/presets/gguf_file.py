"""A GGUF file opened with care: its header and metadata, of which the package that reads them believes everything.

Reads: one .gguf file (`general.architecture` gemma, gemma2, gemma3 or gemma4). The format: the GGUF specification of
the ggml project.
"""

from __future__ import annotations

import functools
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from stages.core.common.errors import StageError, shown
from stages.core.presets.untrusted import brief, refuse_pointer

LARGEST_COUNT = 1 << 16
"""Tensors, or metadata values, of a file: the largest Gemma 3 has some 800, of Gemma 4 the 31B."""

# Further keys that a file may have, and the only values under which keras-hub computes the same.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "pooling_type": (0,),
    "expert_count": (0,),
}
READ = {
    *("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon"),
}
HARMLESS = {"context_length", "vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
PLAIN_ROPE: dict[str, tuple[Any, ...]] = {
    "rope.freq_base": (1.0e4,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1.0,),
}
WINDOWED = {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
OF_GEMMA4 = {
    *("attention.key_length_swa", "attention.value_length_swa", "attention.sliding_window", "final_logit_softcapping"),
    *("attention.sliding_window_pattern", "attention.shared_kv_layers", "embedding_length_per_layer_input"),
    *("rope.freq_base", "rope.freq_base_swa"),
    *("expert_count", "expert_used_count", "expert_feed_forward_length"),
}
# By `general.architecture`: what its files may state besides, and what is read of it.
ARCHITECTURES: dict[str, tuple[dict[str, tuple[Any, ...]], set[str]]] = {
    "gemma": (FIXED | PLAIN_ROPE, READ),
    "gemma2": (FIXED | PLAIN_ROPE | {"attention.sliding_window_pattern": (2,)}, READ | WINDOWED),
    "gemma3": (
        FIXED
        | {
            "rope.freq_base_swa": (1.0e4,),
            "rope.scaling.type": ("linear", "none"),
            "attention.sliding_window_pattern": (6,),
        },
        READ | WINDOWED | {"rope.freq_base", "rope.scaling.factor"},
    ),
    "gemma4": (
        {"attention.causal": (True,), "rope.scaling.type": ("none",), "rope.scaling.factor": (1.0,)},
        READ | OF_GEMMA4,
    ),
}


class _Reader(gguf.GGUFReader):
    """The package's reader, which believes every number of the file, with what a damaged or hostile one needs.

    Arrays are read whole: element by element, 262,144 tokens take it 12 s.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            head = stream.read(24)
        magic, version, tensors, values = struct.unpack("<4sIQQ", head)
        if magic != b"GGUF":
            raise ValueError("GGUF magic invalid")
        if version & 0xFFFF == 0:
            raise ValueError("it was written for machines of the other byte order")
        if max(tensors, values) > LARGEST_COUNT:
            raise ValueError(f"it states {tensors:,} tensors and {values:,} values")
        super().__init__(path)
        end = padded = 0
        for tensor in self.tensors:
            # As llama.cpp demands: one after the other, each from the next multiple of the alignment.
            if tensor.data_offset - self.data_offset != padded:
                raise ValueError(f"{tensor.name} does not follow the tensor before it")
            end = padded + tensor.n_bytes
            padded = -(-end // int(self.alignment)) * int(self.alignment)
        if len(self.data) - self.data_offset not in (end, padded):
            raise ValueError("it does not end where its last tensor does")

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it breaks off")
        return super()._get(offset, dtype, count, override_order)

    def _get_tensor_info_field(self, orig_offs: int) -> Any:
        field = super()._get_tensor_info_field(orig_offs)
        dimensions = field.parts[3].tolist()
        if not 1 <= len(dimensions) <= 4 or not 0 < math.prod(dimensions) <= 8 * len(self.data):
            raise ValueError(f"{field.name} has the shape {dimensions[:4]}")
        return field

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        element = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        types = [gguf.GGUFValueType.ARRAY, element]
        if (dtype := self.gguf_scalar_to_np.get(element)) is not None:
            values = self._get(start, dtype, count)
            return 12 + int(values.nbytes), [values], [0], types
        if element != gguf.GGUFValueType.STRING:
            raise ValueError("it holds an array of arrays")
        content: Any = np.asarray(self.data)
        length_at = struct.Struct("<Q").unpack_from
        strings, offset = [], start
        for _ in range(count):
            (length,) = length_at(content, offset)
            if offset + 8 + length > len(content):
                raise ValueError("it breaks off")
            strings.append(content[offset + 8 : offset + 8 + length])
            offset += 8 + length
        return offset - orig_offs, strings, list(range(count)), types


def only_file(folder: Path) -> Path:
    """Return the .gguf file of a preset's folder.

    Raises:
        StageError: there is none, or more than one.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise StageError(
            f"The preset folder must hold one .gguf file. Received: {len(files)} in {folder}. "
            "Run `python -m stages.fetch`."
        )
    return files[0]


def open_file(path: Path) -> gguf.GGUFReader:
    """Open a GGUF file of a Gemma; the same file is read once, for architecture, tokenizer and weights.

    Raises:
        StageError: it cannot be read, or holds another architecture, or says something that changes the computation.
    """
    refuse_pointer(path)
    try:
        found = path.stat()
    except OSError as error:
        raise _damaged(path, error) from error
    return _opened(path, (found.st_ino, found.st_size, found.st_mtime_ns))


def _damaged(path: Path, error: Exception) -> StageError:
    """Return what is said of a file that cannot be read."""
    return StageError(
        f"The model file must be a complete GGUF file ({shown(error)}). Received: path={path}. "
        "Delete it and run `python -m stages.fetch`."
    )


@functools.lru_cache(maxsize=1)
def _opened(path: Path, _version: tuple[int, ...]) -> gguf.GGUFReader:
    """Open a file of which this is the version."""
    try:
        reader = _Reader(path)
    except (OSError, ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise _damaged(path, error) from error
    architecture = field_of(reader, "general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise StageError(
            f"The GGUF file must hold a text Gemma ({', '.join(ARCHITECTURES)}). "
            f"Received: general.architecture={brief(architecture)} in {path}"
        )
    fixed, read = ARCHITECTURES[architecture]
    prefix = f"{architecture}."
    for key in (key.removeprefix(prefix) for key in reader.fields if key.startswith(prefix)):
        value = field_of(reader, f"{prefix}{key}")
        if key.startswith("rope.dimension_count"):
            # Windowed blocks can have another head size.
            length = key.replace("rope.dimension_count", "attention.key_length")
            allowed: tuple[Any, ...] = (field_of(reader, f"{prefix}{length}"),)
        else:
            allowed = fixed.get(key, (value,) if key in read | HARMLESS else ())
        if value not in allowed:
            raise StageError(
                f"keras-hub's Gemma cannot have {prefix}{shown(key)}={brief(value)}, or this project does not "
                f"know the key. Received: path={path}"
            )
    return reader


def field_of(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    """Return a metadata value, or `default` where the file does not have it.

    Raises:
        StageError: it is text that is no UTF-8.
    """
    field = reader.get_field(key)
    try:
        return default if field is None else field.contents()
    except (ValueError, IndexError, TypeError) as error:
        raise StageError(
            f"The GGUF file must state {key} readably ({shown(error)}). Delete it and fetch it anew."
        ) from error


def need(reader: gguf.GGUFReader, key: str, path: Path) -> Any:
    """Return a metadata value that the file must have.

    Raises:
        StageError: it does not.
    """
    value = field_of(reader, key)
    if value is None:
        raise StageError(f"The GGUF file must state {key}, and does not. Received: path={path}")
    return value
