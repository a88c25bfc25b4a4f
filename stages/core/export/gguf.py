"""A model as a GGUF file, which llama.cpp and what is built on it run.

Purpose: what llama.cpp's own converter would write, without a copy of the model in memory: tensors come one after the
other and are converted in pieces on their way to the file.
Writes: one .gguf file. Source of names, keys and types: llama.cpp's `conversion/gemma.py`.
"""

from __future__ import annotations

import itertools
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
from stages.core.export.hugging_face_config import context_length
from stages.core.export.tensors import PREFIX
from stages.core.export.vocabulary import SPACE, Piece
from stages.core.files import atomic_path
from stages.core.presets.architecture import EPSILON, Architecture
from stages.core.presets.gguf_architecture import BLOCKS_OF_27B, GLOBAL_ROPE_WAVELENGTH
from stages.core.presets.weight_table import StoredWeight, weight_table
from stages.core.records.manifest import License
from stages.core.tokenize.chat import GEMMA
from stages.core.tokenize.control_tokens import NAMES

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
LOCAL_ROPE_WAVELENGTH = 1.0e4
UNUSED_SCORE = -10000.0
"""Of a row of the table without a piece, as llama.cpp's converter gives it."""


def architecture_name(architecture: Architecture) -> str:
    """Return what llama.cpp calls a family: `gemma`, `gemma2` or `gemma3`.

    Raises:
        StageError: the model has something that llama.cpp's does not have, or lacks something that it takes for
            granted; names it. The file would compute another model, in silence.
    """
    config = architecture.config
    if architecture.class_name == "Gemma4Backbone":
        raise StageError(
            "A model to be written as GGUF must be a Gemma 1, 2 or 3. Received: a Gemma 4\n"
            "Leave gguf out of export.formats, and convert models/export/huggingface with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    gemma3 = architecture.class_name == "Gemma3Backbone"
    name = "gemma3" if gemma3 else "gemma2" if config.get("use_post_attention_norm") else "gemma"
    windowed = name != "gemma"
    by_head = config["num_layers"] != BLOCKS_OF_27B.get(name)
    same_scale = config["hidden_dim"] / config["num_query_heads"] == config["head_dim"]
    capped = "a number" if name == "gemma2" else None
    wanted: dict[str, tuple[Any, Any]] = {
        "use_post_attention_norm": (windowed, False),
        "use_post_ffw_norm": (windowed, False),
        "use_sliding_window_attention": (windowed, False),
        "attention_logit_soft_cap": (capped, None),
        "final_logit_soft_cap": (capped, None),
        "use_query_key_norm": (gemma3, architecture.family.query_key_norm),
        "local_rope_scaling_factor": (1.0, 1.0),
    }
    if not same_scale:
        wanted["query_head_dim_normalize"] = (by_head, True)
    for key, (expected, default) in wanted.items():
        value = config.get(key, default)
        if value != expected and (expected != "a number" or value is None):
            raise StageError(
                f"llama.cpp's {name} of {config['num_layers']} blocks has {key}={expected}. Received: {key}={value}\n"
                "Leave gguf out of export.formats: the file would compute another model."
            )
    return name


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
            matrix outputs x inputs, norms without the one that Gemma adds; in the order of `weight_table`.
        vocabulary: of the preset, as a SentencePiece `ModelProto` (`vocabulary.sentencepiece_model`).
        kind: of the matrices: F32, F16, BF16 or Q8_0. Vectors are F32, as llama.cpp wants them; so are a matrix's rows
            F16 where Q8_0's blocks of 32 do not divide them.
        name: shown by what reads the file.
        terms: that the weights come under.
        chat_template: Jinja, for instruct presets.

    Raises:
        StageError: llama.cpp cannot express the model, or a weight is beyond float16's 65504 with kind F16.
        ValueError: a tensor is missing, or comes out of order or in another shape.
    """
    family = architecture_name(architecture)
    table = list(weight_table(architecture).values())
    with atomic_path(target) as temporary:
        writer = quiet_writer(temporary, family)
        writer.add_type("model")
        writer.add_name(name)
        writer.add_license_name(terms.name)
        writer.add_license_link(terms.url)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_sizes(writer, family, architecture)
        _add_vocabulary(writer, vocabulary, architecture.config["vocabulary_size"], chat_template)
        for weight in table:
            _declare(writer, weight, kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_values(writer, table, tensors, kind)
        finally:
            writer.close()


def _write_values(
    writer: gguf.GGUFWriter, table: Sequence[StoredWeight], tensors: Iterable[tuple[str, np.ndarray]], kind: str
) -> None:
    """Write the values of all tensors, each padded to the format's alignment."""
    stream = writer.fout[0]
    writer.write_padding(stream, stream.tell())
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


def _add_sizes(writer: gguf.GGUFWriter, family: str, architecture: Architecture) -> None:
    """State the hyper-parameters."""
    config = architecture.config
    writer.add_context_length(context_length(architecture))
    writer.add_embedding_length(config["hidden_dim"])
    writer.add_block_count(config["num_layers"])
    writer.add_feed_forward_length(architecture.ffw_dim)
    writer.add_head_count(config["num_query_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(EPSILON)
    if family == "gemma":
        return
    writer.add_sliding_window(config.get("sliding_window_size", 4096))
    if family == "gemma2":
        writer.add_attn_logit_softcapping(float(config["attention_logit_soft_cap"]))
        writer.add_final_logit_softcapping(float(config["final_logit_soft_cap"]))
        return
    writer.add_rope_freq_base(GLOBAL_ROPE_WAVELENGTH)
    writer.add_rope_freq_base_swa(LOCAL_ROPE_WAVELENGTH)
    if (factor := config.get("global_rope_scaling_factor", 1.0)) != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(factor))


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Any, rows: int, chat_template: str | None) -> None:
    """State the tokenizer: a token for each row of the table, in llama.cpp's form of SentencePiece's BPE.

    What spells a control token in text is one, if asked for (`parse_special`), only if its type says control; in most
    vocabularies of SentencePiece the turns' are user-defined. The other types are SentencePiece's, by its numbers.
    """
    tokens, scores, types = [], [], []
    # Some tables have rows without a piece, and some vocabularies a piece for images beyond a text model's table.
    surplus = (Piece(piece=f"[PAD{number}]", score=UNUSED_SCORE, type=Piece.UNUSED) for number in range(rows))
    for piece in itertools.islice(itertools.chain(vocabulary.pieces, surplus), rows):
        kind = Piece.CONTROL if piece.type != Piece.UNKNOWN and NAMES.fullmatch(piece.piece) else piece.type
        # llama.cpp looks for user-defined tokens before it writes spaces as U+2581.
        tokens.append(piece.piece.replace(SPACE, " ") if kind == Piece.USER_DEFINED else piece.piece)
        scores.append(piece.score)
        types.append(int(kind))
    ids = {token: number for number, token in enumerate(tokens)}
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(ids["<bos>"])
    writer.add_eos_token_id(ids["<eos>"])
    writer.add_pad_token_id(ids["<pad>"])
    writer.add_unk_token_id(types.index(Piece.UNKNOWN))
    if GEMMA.end in ids:
        writer.add_eot_token_id(ids[GEMMA.end])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if chat_template:
        writer.add_chat_template(chat_template)


def _kind_of(weight: StoredWeight, kind: str) -> gguf.GGMLQuantizationType:
    """Return the type that a weight is written in."""
    if len(weight.matrix_shape) == 1:
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
        # llama.cpp multiplies by what the file holds, Gemma by one more than its scale.
        yield values.astype(np.float32) + np.float32(1)
        return
    its_kind = _kind_of(weight, kind)
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
