"""Reading Gemma from a Hugging Face folder (safetensors) as keras-hub names and shapes it, in slices.

Purpose: a checkpoint in the form most people hold it in. Only the slice that a device needs is read.
Reads: `config.json` with `model_type` gemma, gemma2, gemma3_text, or gemma3 (its text tower alone), and
`model.safetensors`, or the files that `model.safetensors.index.json` names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from stages.core.common.errors import StageError, shown
from stages.core.presets.untrusted import (
    Heads,
    HeadSize,
    Layers,
    Positive,
    Size,
    Typed,
    brief,
    parse,
    parse_object,
    read_object,
)

if TYPE_CHECKING:
    import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# What has been read of a mapped file stays in this process's memory until the file is closed: after so many bytes.
BYTES_AN_OPENING = 1 << 26

LARGEST_HEADER = 25_000_000
"""Bytes; the format allows 100 MB, and those of the largest Gemma have about 100,000."""

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "gemma3")

# Where the text tower's tensors lie, by what their names begin with; transformers has changed this over the years.
PREFIXES = ("model.", "", "model.language_model.", "language_model.model.")

# keras-hub fixes the wavelengths of rotary embeddings: of Gemma and Gemma 2, and of Gemma 3's windowed layers; and of
# Gemma 3's other layers.
LOCAL_WAVELENGTH, GLOBAL_WAVELENGTH = 1.0e4, 1.0e6


# What a model is built as, by the last part of a name in `architectures`: all have the same tensors.
CLASSES = re.compile(r"Gemma\d?(ForCausalLM|ForConditionalGeneration|(Text)?Model)")

# Keys that change nothing of what is computed or trained here: numbers of tokens, how weights are initialised, how
# transformers runs or generates, who wrote the file.
HARMLESS = {
    *("boi_token_id", "eoi_token_id", "gradient_checkpointing", "image_token_id", "transformers.js_config"),
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path"),
    *("attn_implementation", "bad_words_ids", "begin_suppress_tokens", "boi_token_index", "bos_token_id"),
    *("cache_implementation", "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty"),
    *("do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eoi_token_index", "eos_token_id"),
    *("exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id"),
    *("id2label", "image_token_index", "initializer_range", "label2id", "length_penalty", "max_length"),
    *("max_position_embeddings", "max_window_layers", "min_length", "mm_tokens_per_image", "model_type"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions"),
    *("output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type", "remove_invalid_values"),
    *("repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens"),
    *("task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype"),
    *("torchscript", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16"),
    "use_cache",
}

# Keys that transformers acts on, and the only values under which keras-hub's Gemma computes the same; null is none.
FIXED: dict[str, tuple[Any, ...]] = {
    # An old Gemma says "gelu" in hidden_act and meant the tanh form.
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, []),
    "partial_rotary_factor": (1,),
}


class _Gemma(Typed):
    """The keys of a Gemma that are read; a key that is left out means transformers' default (GemmaConfig)."""

    vocab_size: Size = 256000
    hidden_size: Size = 3072
    intermediate_size: Size = 24576
    num_hidden_layers: Layers = 28
    num_attention_heads: Heads = 16
    num_key_value_heads: Heads = 16
    head_dim: HeadSize = 256
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


class _Gemma2(_Gemma):
    """Gemma2Config."""

    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: Layers = 26
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads = 4
    query_pre_attn_scalar: Positive = 256
    sliding_window: Size = 4096
    layer_types: list[str] | None = None
    sliding_window_pattern: int | None = None
    final_logit_softcapping: Positive | None = 30.0
    attn_logit_softcapping: Positive | None = 50.0


class _Gemma3(_Gemma2):
    """Gemma3TextConfig."""

    vocab_size: Size = 262208
    rope_local_base_freq: Positive | None = None
    final_logit_softcapping: Positive | None = None
    attn_logit_softcapping: Positive | None = None


class _Rope(Typed):
    """How the rotary embeddings of one kind of layer are turned."""

    rope_theta: Positive | None = None
    rope_type: str | None = None
    type: str | None = None
    factor: Positive | None = None
    partial_rotary_factor: float | None = None


SCHEMAS: dict[str, type[_Gemma]] = {"gemma": _Gemma, "gemma2": _Gemma2, "gemma3_text": _Gemma3, "gemma3": _Gemma3}


class _Tensor(NamedTuple):
    """Where a Keras weight comes from: tensor, the Keras shape, and the kind of conversion."""

    name: str
    shape: tuple[int, ...]
    kind: str


def read_config(folder: Path) -> tuple[str, _Gemma]:
    """Return the model type and the text model's configuration.

    Raises:
        StageError: no readable `config.json`, another model, or a key or value that changes what the model computes.
    """
    path = folder / "config.json"
    config = read_object(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise StageError(
            f"The model must be a text Gemma ({', '.join(MODEL_TYPES)}). Received: model_type={shown(kind)}."
        )
    if kind == "gemma3":
        text = config.pop("text_config", None)
        config.pop("vision_config", None)
        if not isinstance(text, dict):
            raise StageError(f"A gemma3 configuration must hold a text_config. Received: none in {path}.")
        # The outer part speaks for the whole model, and has no size of its own.
        parse(Typed, _understood(config, path), f"{path}, outside of text_config,")
        config = text
    return kind, parse(SCHEMAS[kind], _understood(config, path), str(path))


def _refuse(key: str, allowed: Any, received: Any, path: Path) -> None:
    raise StageError(f"keras-hub's Gemma can only have {key}={allowed}. Received: {key}={brief(received)} in {path}.")


def _understood(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a configuration without the keys that change nothing and those whose values are all right.

    Raises:
        StageError: another class of model, quantized weights, or a value that keras-hub's Gemma cannot express.
    """
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method", "quantized") if isinstance(method, dict) else method
        raise StageError(
            f"The weights must be plain floats, not quantized: take the checkpoint that it was made from. "
            f"Received: quantization_config={brief(method)} in {path}"
        )
    built = config.get("architectures") or []
    if not isinstance(built, list) or not all(isinstance(name, str) and CLASSES.fullmatch(name) for name in built):
        _refuse("architectures", "Gemma...ForCausalLM", built, path)
    for key, allowed in FIXED.items():
        value = config.get(key)
        if value is not None and not any(value == each and type(value) in (type(each), float) for each in allowed):
            _refuse(key, allowed[0], value, path)
    known = HARMLESS | FIXED.keys() | {"architectures"}
    # A null of an unknown key says nothing; of a known one it is for the schema to judge.
    fields = {*_Gemma3.model_fields, "_sliding_window_pattern"}
    left = {key: value for key, value in config.items() if key not in known and (value is not None or key in fields)}
    pattern = left.pop("_sliding_window_pattern", None)
    return left if pattern is None else {"sliding_window_pattern": pattern, **left}


def read_architecture(folder: Path) -> dict[str, Any]:
    """Return `{"class_name": ..., "config": {...}}`: the arguments of keras-hub's backbone, but for dtype.

    Raises:
        StageError: the configuration lacks something, or has something that keras-hub's Gemma cannot express.
    """
    kind, config = read_config(folder)
    path = folder / "config.json"
    gemma3 = kind.startswith("gemma3")
    heads, hidden, head_dim = config.num_attention_heads, config.hidden_size, config.head_dim
    arguments: dict[str, Any] = {
        "vocabulary_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_query_heads": heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_dim": hidden,
        # GemmaBackbone counts both gate matrices, Gemma3Backbone counts one.
        "intermediate_dim": config.intermediate_size if gemma3 else 2 * config.intermediate_size,
        "head_dim": head_dim,
        "layer_norm_epsilon": config.rms_norm_eps,
    }
    if isinstance(config, _Gemma2):
        scalar = config.query_pre_attn_scalar
        if scalar not in (head_dim, hidden / heads):
            allowed = f"{head_dim} (head_dim) or {hidden / heads:g} (hidden_size / heads)"
            _refuse("query_pre_attn_scalar", allowed, scalar, path)
        period = 6 if gemma3 else 2
        layers = range(1, config.num_hidden_layers + 1)
        pattern = ["full_attention" if number % period == 0 else "sliding_attention" for number in layers]
        if config.layer_types not in (None, pattern):
            _refuse("layer_types", f"every {period}th full_attention", config.layer_types, path)
        if config.sliding_window_pattern not in (None, period):
            _refuse("sliding_window_pattern", period, config.sliding_window_pattern, path)
        arguments |= {
            "query_head_dim_normalize": scalar == head_dim,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "final_logit_soft_cap": config.final_logit_softcapping,
            "attention_logit_soft_cap": config.attn_logit_softcapping,
            "use_sliding_window_attention": True,
            "sliding_window_size": config.sliding_window,
        }
    rope = _rope(config, path)
    for layer_kind, (wavelength, factor, form) in rope.items():
        wanted = GLOBAL_WAVELENGTH if layer_kind == "full_attention" and gemma3 else LOCAL_WAVELENGTH
        if wavelength != wanted:
            _refuse(f"rope_theta of {layer_kind}", f"{wanted:g}", wavelength, path)
        if form not in ("default", "linear") or (factor != 1.0 and not gemma3):
            _refuse(
                f"rope scaling of {layer_kind}", "linear for Gemma 3 and none for others", f"{form} by {factor}", path
            )
    if gemma3:
        arguments |= {
            "image_size": 896,
            "vision_encoder": None,
            "local_rope_scaling_factor": rope["sliding_attention"][1],
            "global_rope_scaling_factor": rope["full_attention"][1],
        }
    return {"class_name": "Gemma3Backbone" if gemma3 else "GemmaBackbone", "config": arguments}


def _rope(config: _Gemma, path: Path) -> dict[str, tuple[float, float, str]]:
    """Return wavelength, scaling factor and form of the rotary embeddings, by kind of layer.

    transformers 5 writes `rope_parameters` (for Gemma 3 one for each kind of layer); before, there were `rope_theta`,
    `rope_local_base_freq` and `rope_scaling`, the last for Gemma 3's full layers only.
    """
    newer, scaling = config.rope_parameters or {}, config.rope_scaling or {}
    if isinstance(config, _Gemma3):
        if strange := newer.keys() - {"full_attention", "sliding_attention"}:
            raise StageError(
                f"rope_parameters of a Gemma 3 must be those of full_attention and sliding_attention. "
                f"Received: {shown(min(strange))} in {path}"
            )
        parts = {
            "full_attention": (config.rope_theta or GLOBAL_WAVELENGTH, scaling, newer.get("full_attention")),
            "sliding_attention": (config.rope_local_base_freq or LOCAL_WAVELENGTH, {}, newer.get("sliding_attention")),
        }
    else:
        parts = {"full_attention": (config.rope_theta or LOCAL_WAVELENGTH, scaling, newer)}
    found = {}
    for kind, (wavelength, older, given) in parts.items():
        given = {} if given is None else given
        # transformers 4 takes the one and transformers 5 the other, key by key.
        if isinstance(given, dict) and any(given[key] != older[key] for key in given.keys() & older.keys()):
            raise StageError(
                f"{path} must say the same in rope_scaling and rope_parameters of {kind}. "
                f"Received: {brief(older)} and {brief(given)}"
            )
        rope = parse(_Rope, {**older, **given} if isinstance(given, dict) else given, f"{path}: rope of {kind}")
        form = rope.rope_type or rope.type or "default"
        # The plain form scales nothing, in transformers too, whatever factor stands beside it.
        factor = (rope.factor or 1.0) if form != "default" else 1.0
        if (form == "linear" and rope.factor is None) or (rope.rope_type or rope.type or form) != (rope.type or form):
            _refuse(f"rope scaling of {kind}", "one rope_type with its factor", {**older, **given}, path)
        if rope.factor not in (None, 1) and not (rope.rope_type or rope.type):
            _refuse(f"rope scaling of {kind}", "a rope_type beside its factor", {**older, **given}, path)
        if rope.partial_rotary_factor not in (None, 1):
            _refuse("partial_rotary_factor", 1, rope.partial_rotary_factor, path)
        stated = config.rope_theta if kind == "full_attention" else getattr(config, "rope_local_base_freq", None)
        if rope.rope_theta and stated not in (None, rope.rope_theta):
            raise StageError(
                f"{path} must state one rope_theta of {kind}. Received: {brief(stated)} and {brief(rope.rope_theta)}"
            )
        found[kind] = (rope.rope_theta or wavelength, float(factor), form)
    return found


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the weight files: the single one, or those that the index names.

    Raises:
        StageError: neither is there, or the index cannot be read.
    """
    if (folder / SINGLE).is_file():
        return (SINGLE,)
    if not (folder / INDEX).is_file():
        raise StageError(f"A Hugging Face folder must hold {SINGLE}, or {INDEX} with a weight_map. Received: {folder}")
    return shards_of(read_object(folder / INDEX), folder / INDEX)


def shards_of(index: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Return the file names that an index points to, each once, sorted.

    Keras writes one name or a list of names for each layer, Hugging Face one for each tensor.

    Raises:
        StageError: it has no map, or one of something else than files beside it.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise StageError(f"{path} must be an index with a weight_map. Received: keys {shown(', '.join(index))}")
    names = set()
    for target in weight_map.values():
        for name in target if isinstance(target, list) else [target]:
            if not isinstance(name, str) or not name or "\0" in name or Path(name).name != name:
                raise StageError(
                    f"{path} must name files beside it. Received: {shown(name)} (which does not lie there)"
                )
            names.add(name)
    if not names:
        raise StageError(f"{path} must be an index with a weight_map. Received: an empty one")
    return tuple(sorted(names))


class Stored(NamedTuple):
    """What a header says of a tensor: its shape, its dtype as the format writes it, and the file."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class _Entry(Typed):
    """What a header says of a tensor, the bytes counted from the header's end."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


def header_end(start: bytes, file: str) -> int:
    """Return where the header of a safetensors file ends, by the first 8 bytes of the file.

    Raises:
        StageError: they are fewer, or the header would be larger than the format allows.
    """
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > LARGEST_HEADER:
        raise StageError(
            f"{file} must begin with the length of a safetensors header. Received: {brief(bytes(start[:8]))}"
        )
    return 8 + length


def read_header(start: bytes, file: str, size: int | None) -> dict[str, Stored]:
    """Return the tensors that the header of a safetensors file states, by name.

    Args:
        start: the file's bytes up to `header_end`; what follows is not looked at.
        file: its name, for messages.
        size: bytes of the whole file, None where that is not known.

    Raises:
        StageError: it is no header, or one of a file of another size.

    Source: https://huggingface.co/docs/safetensors: 8 bytes with the length of the JSON that follows, then the values.
    """
    end = header_end(start, file)
    content = parse_object(start[8:end], f"The header of {file}")
    content.pop("__metadata__", None)
    entries = {
        name: parse(_Entry, entry, f"The header of {file}, tensor {brief(name)},") for name, entry in content.items()
    }
    stated = end + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if size is not None and size != stated:
        raise StageError(f"{file} must have the {stated:,} bytes that its header states. Received: {size:,} bytes")
    return {name: Stored(tuple(entry.shape), entry.dtype, file) for name, entry in entries.items()}


# What the files may hold beside the weights: buffers that are worked out anew, and the other towers of a Gemma 3.
BUFFERS = re.compile(r"(.*\.)?rotary_emb(_local)?\.(original_)?inv_freq")
OTHER_TOWERS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
HEAD = re.compile(r"(.*\.)?lm_head\.weight")
PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")


def check_tensors(folder: Path, stored: Mapping[str, Stored]) -> dict[str, _Tensor]:
    """Hold the tensors that the headers state against the configuration, and return where each weight comes from.

    Args:
        folder: with the `config.json`; the weights need not be there.
        stored: by the tensor's name.

    Raises:
        StageError: a tensor is missing, unknown, of another shape, or not of plain floats; names it.
    """
    kind, _ = read_config(folder)
    prefix = next((each for each in PREFIXES if f"{each}embed_tokens.weight" in stored), None)
    if adapter := next((name for name in stored if ".lora_" in name), None):
        raise StageError(
            f"The weights must be whole, and these are of a LoRA adapter that was not merged. "
            f"Received: {shown(adapter)}\n"
            "Merge it with PEFT's `merge_and_unload()` and save the model."
        )
    if prefix is None:
        raise StageError(
            "The weight files must hold the tensor model.embed_tokens.weight (also without model., or with "
            f"language_model. in it), and do not. Received: {_some(stored)}\n"
            "Save the model itself with transformers' `save_pretrained`, without a wrapper around it."
        )
    table = _table(read_architecture(folder)["config"], prefix, kind)
    wanted = {tensor.name: path for path, tensor in table.items()}
    for path, tensor in table.items():
        if tensor.name not in stored:
            others = [name for name in stored if name not in wanted]
            raise StageError(
                f"The weight files must hold {tensor.name} (for {path}), and do not. Received: "
                f"{_some(difflib.get_close_matches(tensor.name, others, cutoff=0) or stored)}. "
                "Download the checkpoint again."
            )
        if stored[tensor.name].shape != (shape := _stored_shape(tensor)):
            raise StageError(
                f"The tensor {tensor.name} (for {path}) must have the shape {shape} that config.json gives it. "
                f"Received: shape={stored[tensor.name].shape} in {stored[tensor.name].file}."
            )
    for name, found in stored.items():
        if name in wanted or HEAD.fullmatch(name):
            if found.dtype not in PLAIN_FLOATS:
                raise StageError(
                    f"The weights must be plain floats ({', '.join(PLAIN_FLOATS)}), not quantized. Received: {name} "
                    f"of {found.dtype} in {found.file}"
                )
        elif not BUFFERS.fullmatch(name) and not (kind == "gemma3" and OTHER_TOWERS.fullmatch(name)):
            raise StageError(
                f"The weight files hold a tensor that a text Gemma of this config.json does not have. "
                f"Received: {shown(name)} in {found.file}"
            )
    return table


def twice(tensor: str, *files: str) -> StageError:
    """Return the error for a tensor that is in two files."""
    return StageError(f"Each tensor must lie in one file. Received: {shown(tensor)} in {' and in '.join(files)}")


def _some(names: Iterable[str]) -> str:
    """Return the first of many names, for a message."""
    listed = sorted(names)
    return shown(", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")) or "none"


class SafetensorsWeights:
    """The weights of a Hugging Face folder under keras-hub's weight paths and in its shapes, read slice by slice."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files and check that every weight is there; no weight is read yet.

        Raises:
            StageError: a file is missing or damaged, a tensor is missing, unknown, or has another shape or dtype.
        """
        # Gives numpy the dtype bfloat16, which most checkpoints are in.
        import ml_dtypes  # noqa: F401

        self._folder = folder
        self._opened: tuple[str, Any] | None = None
        self._bytes_read = 0
        self._stored: dict[str, Stored] = {}
        for file in weight_files(folder):
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (the file is no mapping)
                    if name in self._stored:
                        raise twice(name, file, self._stored[name].file)
                    part = tensors.get_slice(name)
                    self._stored[name] = Stored(tuple(part.get_shape()), part.get_dtype(), file)
        self._table = check_tensors(folder, self._stored)

    def check_head(self) -> None:
        """Check that a language head in the files is the embedding table, which takes its place here.

        Raises:
            StageError: it is another: the model would give other tokens.
        """
        import numpy as np

        table = self._table["token_embedding/embeddings"].name
        for head in (name for name in self._stored if HEAD.fullmatch(name)):
            same = self._stored[head].shape == self._stored[table].shape
            rows = self._stored[table].shape[0] if same else 0
            step = max(1, BYTES_AN_OPENING // (8 * self._stored[table].shape[1]))
            for start in range(0, rows, step):
                parts = []
                for name in (head, table):
                    values = self._slices(self._stored[name].file).get_slice(name)[start : min(start + step, rows)]
                    self._bytes_read += values.nbytes
                    parts.append(values)
                same = same and np.array_equal(*parts)
            if not same:
                raise StageError(
                    f"The language head must be the embedding table, as in every Gemma. Received: {head} in "
                    f"{self._stored[head].file}, which differs from {table}\n"
                    "This project has no head of its own: it would compute other tokens than the checkpoint."
                )

    def shape(self, path: str) -> tuple[int, ...]:
        """Return a weight's Keras shape, without reading it."""
        return self._table[path].shape

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice (steps of 1) of a weight in Keras' shape and the file's dtype; only that slice is read."""
        values = self._read(path, index)
        self._bytes_read += values.nbytes
        return values

    def _read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        import numpy as np

        name, shape, kind = self._table[path]
        stored = self._slices(self._stored[name].file).get_slice(name)
        cuts = [slice(*cut.indices(size)[:2]) for cut, size in zip(index, shape, strict=True)]
        if kind == "same":
            return stored[tuple(cuts)]
        if kind == "transposed":
            return stored[cuts[1], cuts[0]].T
        # A head's rows (or columns) lie together in a matrix of PyTorch's order, outputs x inputs.
        heads = range(cuts[0].start, cuts[0].stop)
        if kind == "heads_first":
            size, within, hidden = shape[2], cuts[2], cuts[1]
            parts = [stored[head * size + within.start : head * size + within.stop, hidden] for head in heads]
        else:
            size, within, hidden = shape[1], cuts[1], cuts[2]
            parts = [stored[hidden, head * size + within.start : head * size + within.stop] for head in heads]
        return np.stack(parts).transpose(0, 2, 1)

    def close(self) -> None:
        """Close the file that is open."""
        if self._opened:
            self._opened[1].__exit__(None, None, None)
            self._opened = None

    def _slices(self, file: str) -> Any:
        """Return the open file."""
        if self._opened is None or self._opened[0] != file or self._bytes_read > BYTES_AN_OPENING:
            self.close()
            self._bytes_read = 0
            self._opened = (file, self._open(file).__enter__())
        return self._opened[1]

    def _open(self, file: str) -> Any:
        """Open a file (memory-mapped)."""
        from safetensors import SafetensorError, safe_open

        try:
            if not (self._folder / file).is_file():
                raise FileNotFoundError("no such file")
            return safe_open(self._folder / file, framework="np")
        except (OSError, SafetensorError) as error:
            raise StageError(
                f"The weights file {file} must be a complete safetensors file ({error}). Received: "
                f"folder={self._folder}. Download it again."
            ) from error


def _table(config: dict[str, Any], prefix: str, kind: str) -> dict[str, _Tensor]:
    """Return where each Keras weight comes from."""
    hidden, head_dim = config["hidden_dim"], config["head_dim"]
    heads, kv_heads = config["num_query_heads"], config["num_key_value_heads"]
    wide = config["intermediate_dim"] if kind.startswith("gemma3") else config["intermediate_dim"] // 2
    norms = {"pre_attention_norm": "input_layernorm"}
    if kind == "gemma":
        # Gemma's only other norm stands before the feed-forward layers, whatever its name says.
        norms["pre_ffw_norm"] = "post_attention_layernorm"
    else:
        norms["post_attention_norm"] = "post_attention_layernorm"
        norms["pre_ffw_norm"] = "pre_feedforward_layernorm"
        norms["post_ffw_norm"] = "post_feedforward_layernorm"
    block: dict[str, _Tensor] = {
        f"{layer}/scale": _Tensor(f"{name}.weight", (hidden,), "same") for layer, name in norms.items()
    }
    if kind.startswith("gemma3"):
        block["attention/query_norm/scale"] = _Tensor("self_attn.q_norm.weight", (head_dim,), "same")
        block["attention/key_norm/scale"] = _Tensor("self_attn.k_norm.weight", (head_dim,), "same")
    for layer, name, count in (("query", "q_proj", heads), ("key", "k_proj", kv_heads), ("value", "v_proj", kv_heads)):
        shape = (count, hidden, head_dim)
        block[f"attention/{layer}/kernel"] = _Tensor(f"self_attn.{name}.weight", shape, "heads_first")
    block["attention/attention_output/kernel"] = _Tensor(
        "self_attn.o_proj.weight", (heads, head_dim, hidden), "heads_last"
    )
    block["ffw_gating/kernel"] = _Tensor("mlp.gate_proj.weight", (hidden, wide), "transposed")
    block["ffw_gating_2/kernel"] = _Tensor("mlp.up_proj.weight", (hidden, wide), "transposed")
    block["ffw_linear/kernel"] = _Tensor("mlp.down_proj.weight", (wide, hidden), "transposed")
    table = {
        "token_embedding/embeddings": _Tensor("embed_tokens.weight", (config["vocabulary_size"], hidden), "same"),
        "final_normalization/scale": _Tensor("norm.weight", (hidden,), "same"),
    }
    for number in range(config["num_layers"]):
        for path, tensor in block.items():
            table[f"decoder_block_{number}/{path}"] = tensor._replace(name=f"layers.{number}.{tensor.name}")
    return {path: tensor._replace(name=prefix + tensor.name) for path, tensor in table.items()}


def _stored_shape(tensor: _Tensor) -> tuple[int, ...]:
    """Return the shape that the tensor has in the file."""
    if tensor.kind == "heads_first":
        heads, hidden, head_dim = tensor.shape
        return (heads * head_dim, hidden)
    if tensor.kind == "heads_last":
        heads, head_dim, hidden = tensor.shape
        return (hidden, heads * head_dim)
    return tensor.shape[::-1] if tensor.kind == "transposed" else tensor.shape
