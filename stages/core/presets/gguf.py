"""Reading Gemma 3 from a GGUF file as keras-hub names and shapes it: architecture, weights, tokenizer.

Purpose: the embedded model is a quantized GGUF; the pipeline knows only keras-hub's `Gemma3Backbone`. Weights are
dequantized one at a time, so that loading needs the memory of one of them, not of the model.
Reads: one .gguf file (`general.architecture` must be gemma3). The format: the GGUF specification of the ggml project.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from stages.core.common.errors import StageError, shown
from stages.core.presets.untrusted import brief, refuse_pointer

CHUNK_ELEMENTS = 1 << 19
"""Values dequantized at a time by a thread: their temporaries (some 8 MB) still fit in a core's cache."""

GLOBAL_ROPE_WAVELENGTH = 1.0e6
"""keras-hub's Gemma3Backbone has it as a constant for its global layers (and 1.0e4 for the local ones)."""

LARGEST_COUNT = 1 << 16
"""Tensors, or metadata values, of a file: the largest Gemma 3 has some 800."""

TABLE, HEAD = "token_embd.weight", "output.weight"

# What a file may say of the model beside what is read, and the only values under which keras-hub computes the same.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.freq_base_swa": (1.0e4,),
    "rope.scaling.type": ("linear", "none"),
    "attention.sliding_window_pattern": (6,),
    "pooling_type": (0,),
    "expert_count": (0,),
}
READ = {
    *("rope.freq_base", "block_count", "embedding_length", "feed_forward_length", "rope.scaling.factor"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.sliding_window", "attention.layer_norm_rms_epsilon"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
}
HARMLESS = {"context_length", "vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length"}

UNKNOWN, USER_DEFINED, BYTE = 2, 4, 6
"""Token types; GGUF took over the numbers of SentencePiece's `ModelProto.SentencePiece.Type`."""


class _Reader(gguf.GGUFReader):
    """The package's reader, which believes every number of the file, with what a damaged or hostile one needs.

    Arrays are read at once: element by element, 262,144 tokens take it 12 s.
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


def _open(path: Path) -> _Reader:
    """Open a GGUF file of a Gemma 3 model.

    Raises:
        StageError: it cannot be read, or holds another architecture, or says something that changes the computation.
    """
    refuse_pointer(path)
    try:
        reader = _Reader(path)
    except (OSError, ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise StageError(
            f"The model file must be a complete GGUF file ({shown(error)}). Received: path={path}. "
            "Delete it and run `python -m stages.fetch`."
        ) from error
    architecture = _field(reader, "general.architecture")
    if architecture != "gemma3":
        raise StageError(
            "The GGUF file must hold a Gemma 3 text model. "
            f"Received: general.architecture={brief(architecture)} in {path}"
        )
    for key in (key.removeprefix("gemma3.") for key in reader.fields if key.startswith("gemma3.")):
        value = _field(reader, f"gemma3.{key}")
        if key == "rope.dimension_count":
            allowed: tuple[Any, ...] = (_field(reader, "gemma3.attention.key_length"),)
        else:
            allowed = FIXED.get(key, (value,) if key in READ | HARMLESS else ())
        if value not in allowed:
            raise StageError(
                f"keras-hub's Gemma 3 cannot have gemma3.{shown(key)}={brief(value)}, or this project does not "
                f"know the key. Received: path={path}"
            )
    return reader


def _field(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
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


def read_architecture(path: Path) -> dict[str, Any]:
    """Return `{"class_name": "Gemma3Backbone", "config": {...}}`: the arguments of keras-hub's backbone, but for dtype.

    Raises:
        StageError: the file is not a Gemma 3 GGUF, lacks a hyper-parameter, or has one that keras-hub cannot express.
    """
    return _architecture(_open(path), path)


def _architecture(reader: gguf.GGUFReader, path: Path) -> dict[str, Any]:
    """Return the architecture of an open file (`path` for messages)."""

    def need(key: str) -> Any:
        value = _field(reader, f"gemma3.{key}")
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
    found: dict[str, Any] = {
        "class_name": "Gemma3Backbone",
        "config": {
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
            "attention_logit_soft_cap": _field(reader, "gemma3.attn_logit_softcapping"),
            "final_logit_soft_cap": _field(reader, "gemma3.final_logit_softcapping"),
            "use_sliding_window_attention": True,
            "sliding_window_size": need("attention.sliding_window"),
            "local_rope_scaling_factor": 1.0,
            "global_rope_scaling_factor": _field(reader, "gemma3.rope.scaling.factor", 1.0),
            "vision_encoder": None,
            # Stored as float32: 9.999999974752427e-07 was written as 1e-06.
            "layer_norm_epsilon": float(str(np.float32(epsilon))),
            "dropout": 0,
        },
    }
    for key in ("num_layers", "num_query_heads", "num_key_value_heads", "hidden_dim", "intermediate_dim", "head_dim"):
        value = found["config"][key]
        # Every block has tensors, so there are fewer blocks.
        if not isinstance(value, int) or not 1 <= value <= (len(names) if key == "num_layers" else 1 << 22):
            raise StageError(f"The GGUF file must state sizes of a Gemma 3. Received: {key}={brief(value)} in {path}")
    return found


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
        reader = _open(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._weights: dict[str, _Weight] = {}
        for weight_path, (name, shape, kind) in _weight_table(_architecture(reader, path)["config"]).items():
            if name not in tensors:
                raise StageError(f"The GGUF file must hold {name} (for {weight_path}). Received: path={path}")
            tensor = tensors.pop(name)
            if tensor.shape.tolist() != _stored_shape(shape, kind):
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


def _weight_table(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Return, for each Keras weight path, the GGUF tensor, the Keras shape, and the kind of conversion."""
    hidden, head_dim, wide = config["hidden_dim"], config["head_dim"], config["intermediate_dim"]
    heads, key_value_heads = config["num_query_heads"], config["num_key_value_heads"]
    table: dict[str, tuple[str, tuple[int, ...], str]] = {
        "token_embedding/embeddings": ("token_embd.weight", (config["vocabulary_size"], hidden), "rows"),
    }
    for index in range(config["num_layers"]):
        gguf_block, block = f"blk.{index}", f"decoder_block_{index}"
        layers: dict[str, tuple[str, tuple[int, ...], str]] = {
            "pre_attention_norm/scale": ("attn_norm", (hidden,), "scale")
        }
        if config["use_post_attention_norm"]:
            layers["post_attention_norm/scale"] = ("post_attention_norm", (hidden,), "scale")
        layers["attention/query/kernel"] = ("attn_q", (heads, hidden, head_dim), "heads_first")
        layers["attention/key/kernel"] = ("attn_k", (key_value_heads, hidden, head_dim), "heads_first")
        layers["attention/value/kernel"] = ("attn_v", (key_value_heads, hidden, head_dim), "heads_first")
        if config["use_query_key_norm"]:
            layers["attention/query_norm/scale"] = ("attn_q_norm", (head_dim,), "scale")
            layers["attention/key_norm/scale"] = ("attn_k_norm", (head_dim,), "scale")
        layers["attention/attention_output/kernel"] = ("attn_output", (heads, head_dim, hidden), "heads_last")
        layers["pre_ffw_norm/scale"] = ("ffn_norm", (hidden,), "scale")
        if config["use_post_ffw_norm"]:
            layers["post_ffw_norm/scale"] = ("post_ffw_norm", (hidden,), "scale")
        layers["ffw_gating/kernel"] = ("ffn_gate", (hidden, wide), "transposed")
        layers["ffw_gating_2/kernel"] = ("ffn_up", (hidden, wide), "transposed")
        layers["ffw_linear/kernel"] = ("ffn_down", (wide, hidden), "transposed")
        for name, (tensor, shape, kind) in layers.items():
            table[f"{block}/{name}"] = (f"{gguf_block}.{tensor}.weight", shape, kind)
    table["final_normalization/scale"] = ("output_norm.weight", (hidden,), "scale")
    return table


def _stored_shape(shape: tuple[int, ...], kind: str) -> list[int]:
    """Return the shape that GGUF states of a tensor: the axis that runs fastest first."""
    if kind == "heads_first":
        heads, hidden, head_dim = shape
        return [hidden, heads * head_dim]
    if kind == "heads_last":
        heads, head_dim, hidden = shape
        return [heads * head_dim, hidden]
    return list(shape) if kind == "transposed" else list(shape[::-1])


_LEADING_AXIS: dict[str, Callable[[tuple[int, ...]], tuple[bool, int]]] = {
    "scale": lambda shape: (True, 1),
    "rows": lambda shape: (True, 1),
    "heads_first": lambda shape: (True, shape[2]),
    "heads_last": lambda shape: (False, shape[1]),
    "transposed": lambda shape: (False, 1),
}
"""For each kind of conversion: whether the leading Keras axis runs over GGUF's rows (else along a row), and how many
rows or values one step of it takes."""


def _to_keras(values: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return GGUF values (PyTorch's order of a linear layer: outputs x inputs) as a Keras weight.

    Args:
        values: rows or columns of the tensor that belong to whole steps of the leading Keras axis.
        kind: of the conversion, as in `_weight_table`.
        shape: of the whole Keras weight; the result has fewer entries in its leading axis where `values` is a part.
    """
    if kind == "scale":
        # llama.cpp multiplies by the stored scale, Keras by one plus the scale.
        return values[:, 0] - np.float32(1)
    if kind == "heads_first":
        _, hidden, head_dim = shape
        return values.reshape(-1, head_dim, hidden).transpose(0, 2, 1)
    if kind == "heads_last":
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


def tokenizer_proto(path: Path) -> bytes:
    """Return the file's tokenizer as a SentencePiece model: BPE with byte fallback, no normalizing, no dummy prefix.

    Raises:
        StageError: the file is not a Gemma 3 GGUF, or its tokenizer is of another kind.
    """
    from sentencepiece import sentencepiece_model_pb2

    reader = _open(path)
    kind = _field(reader, "tokenizer.ggml.model")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    scores = _field(reader, "tokenizer.ggml.scores")
    types = _field(reader, "tokenizer.ggml.token_type")
    lists = all(isinstance(each, list) and each for each in (tokens, scores, types))
    if kind != "llama" or not lists or not len(tokens) == len(scores) == len(types):
        raise StageError(
            "The GGUF file must hold a SentencePiece tokenizer (tokens, scores and types, of equal length). "
            f"Received: tokenizer.ggml.model={kind!r} in {path}"
        )
    special = {name: _field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("padding", "eos", "bos", "unknown")}
    for name, number in special.items():
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise StageError(f"The GGUF file must state tokenizer.ggml.{name}_token_id. Received: {number} in {path}")
    kinds = set(sentencepiece_model_pb2.ModelProto.SentencePiece.Type.values())
    if (
        not all(isinstance(token, str) for token in tokens)
        or not kinds.issuperset(types)
        or not np.isfinite(scores).all()
    ):
        raise StageError(f"The GGUF file must hold tokens with scores and known types. Received: others in {path}")
    proto = sentencepiece_model_pb2.ModelProto()
    for number, (token, score, token_type) in enumerate(zip(tokens, scores, types, strict=True)):
        piece = proto.pieces.add()
        # GGUF writes runs of spaces as they are; SentencePiece looks for pieces in text whose spaces are escaped.
        piece.piece = token.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}") if token_type == USER_DEFINED else token
        piece.score = score
        # GGUF files say "control" of the unknown token; SentencePiece then knows none: a missing piece gets -1.
        piece.type = UNKNOWN if number == special["unknown"] else token_type
    trainer = proto.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in types
    trainer.pad_id, trainer.pad_piece = special["padding"], tokens[special["padding"]]
    trainer.eos_id, trainer.eos_piece = special["eos"], tokens[special["eos"]]
    trainer.bos_id, trainer.bos_piece = special["bos"], tokens[special["bos"]]
    trainer.unk_id, trainer.unk_piece = special["unknown"], tokens[special["unknown"]]
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(_field(reader, "tokenizer.ggml.add_space_prefix", False))
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return proto.SerializeToString(deterministic=True)
