"""A Hugging Face folder's `config.json` as the class and arguments of a keras-hub backbone.

Every key is understood, or on a list of harmless ones, or refused.
Reads: `config.json` with `model_type` gemma, gemma2, vaultgemma, gemma3_text or gemma4_text, or gemma3 or gemma4 (the
text model alone).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stages.core.common.errors import StageError, shown
from stages.core.presets import hf_gemma4
from stages.core.presets.architecture import FAMILIES, Architecture
from stages.core.presets.hf_gemma4 import Gemma4Text
from stages.core.presets.layer_kinds import GLOBAL_WAVELENGTH, LOCAL_WAVELENGTH
from stages.core.presets.untrusted import Heads, HeadSize, Layers, Positive, Size, Typed, brief, parse, read_object

MODEL_TYPES = ("gemma", "gemma2", "vaultgemma", "gemma3_text", "gemma3", "gemma4_text", "gemma4")
WITH_TOWERS = {"gemma3": ("vision_config",), "gemma4": ("vision_config", "audio_config")}
"""Model types with towers beside the text model, and the keys of those."""
# What a model is built as, by the last part of a name in `architectures`: all have the same tensors.
CLASSES = re.compile(r"(Vault)?Gemma\d?(ForCausalLM|ForConditionalGeneration|(Text)?Model)")
# Keys that change nothing of what is computed or trained here: numbers of tokens, how weights are initialised, how
# transformers runs or generates, who wrote the file.
HARMLESS = {
    *("boa_token_id", "eoa_token_id", "boa_token_index", "eoa_token_index", "audio_token_id", "video_token_id"),
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
FIXED_OF_GEMMA4: dict[str, tuple[Any, ...]] = {"use_bidirectional_attention": (False, "vision")}
"""Pixels of one image see each other; text looks back only."""


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


class _Vault(_Gemma2):
    """VaultGemmaConfig: a Gemma 2 without norms after attention and feed-forward layers."""


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


OLDER_FIELDS = {*_Gemma3.model_fields, "_sliding_window_pattern"}
SCHEMAS: dict[str, type[_Gemma]] = {
    **{"gemma": _Gemma, "gemma2": _Gemma2, "vaultgemma": _Vault},
    **{"gemma3_text": _Gemma3, "gemma3": _Gemma3},
}


def read_config(folder: Path) -> tuple[str, _Gemma | Gemma4Text]:
    """Return the model type and the text model's configuration.

    Raises:
        StageError: no readable `config.json`, another model, or a key or value that changes what the model computes.
    """
    path = folder / "config.json"
    config = read_object(path)
    kind = config.get("model_type")
    if isinstance(kind, str) and kind.startswith("gemma4") and kind.endswith("assistant"):
        raise StageError(
            f"The model must be a text Gemma by itself, and an assistant only drafts tokens for another model, whose "
            f"keys and values it reads. Received: model_type={shown(kind)}."
        )
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise StageError(
            f"The model must be a text Gemma ({', '.join(MODEL_TYPES)}). Received: model_type={shown(kind)}."
        )
    schema: type[_Gemma] | type[Gemma4Text] = Gemma4Text if kind.startswith("gemma4") else SCHEMAS[kind]
    if kind in WITH_TOWERS:
        text = config.pop("text_config", None)
        for key in WITH_TOWERS[kind]:
            config.pop(key, None)
        if not isinstance(text, dict):
            raise StageError(f"A {kind} configuration must hold a text_config. Received: none in {path}.")
        # The outer part describes the whole model, and has no sizes.
        parse(Typed, _understood(config, path, schema), f"{path}, outside of text_config,")
        config = text
    return kind, parse(schema, _understood(config, path, schema), str(path))


def _refuse(key: str, allowed: Any, received: Any, path: Path) -> None:
    raise StageError(f"keras-hub's Gemma can only have {key}={allowed}. Received: {key}={brief(received)} in {path}.")


def _understood(config: dict[str, Any], path: Path, schema: type[Typed]) -> dict[str, Any]:
    """Return a configuration without the keys that change nothing and those whose values are all right.

    Args:
        config: all keys.
        path: for messages.
        schema: of the text model; what it knows must have its types even where it is null.

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
    fixed = FIXED | FIXED_OF_GEMMA4 if schema is Gemma4Text else FIXED
    for key, allowed in fixed.items():
        value = config.get(key)
        if value is not None and not any(value == each and type(value) in (type(each), float) for each in allowed):
            _refuse(key, allowed[0], value, path)
    known = HARMLESS | FIXED.keys() | {"architectures"}
    # A null of an unknown key says nothing; of a known one it is for the schema to judge.
    fields = set(schema.model_fields) if schema is Gemma4Text else OLDER_FIELDS
    left = {key: value for key, value in config.items() if key not in known and (value is not None or key in fields)}
    pattern = left.pop("_sliding_window_pattern", None)
    return left if pattern is None else {"sliding_window_pattern": pattern, **left}


def read_architecture(folder: Path) -> Architecture:
    """Return the architecture of a Hugging Face folder.

    Raises:
        StageError: the configuration lacks something, or has something that keras-hub's Gemma cannot express.
    """
    kind, config = read_config(folder)
    path = folder / "config.json"
    if isinstance(config, Gemma4Text):
        return hf_gemma4.read(config, path)
    gemma3 = kind.startswith("gemma3")
    class_name = "Gemma3Backbone" if gemma3 else "GemmaBackbone"
    heads, hidden, head_dim = config.num_attention_heads, config.hidden_size, config.head_dim
    arguments: dict[str, Any] = {
        "vocabulary_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_query_heads": heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_dim": hidden,
        "intermediate_dim": config.intermediate_size * FAMILIES[class_name].gates,
        "head_dim": head_dim,
        "layer_norm_epsilon": config.rms_norm_eps,
    }
    if isinstance(config, _Gemma2):
        arguments |= _of_gemma2(config, path, 6 if gemma3 else 2)
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
    return Architecture(class_name, arguments)


def _of_gemma2(config: _Gemma2, path: Path, period: int) -> dict[str, Any]:
    """Return the arguments that Gemma 2 has beside Gemma's, and those after it.

    Args:
        config: of the text model.
        path: of its file, for messages.
        period: the last of each group of this many layers has no window.
    """
    scalar = config.query_pre_attn_scalar
    head_dim, by_heads = config.head_dim, config.hidden_size / config.num_attention_heads
    if scalar not in (head_dim, by_heads):
        allowed = f"{head_dim} (head_dim) or {by_heads:g} (hidden_size / heads)"
        _refuse("query_pre_attn_scalar", allowed, scalar, path)
    layers = range(1, config.num_hidden_layers + 1)
    pattern = ["full_attention" if number % period == 0 else "sliding_attention" for number in layers]
    # One that Google trained on 1,024 tokens has no windows.
    vault = isinstance(config, _Vault)
    windowed = not (vault and config.layer_types == ["full_attention"] * config.num_hidden_layers)
    if windowed and config.layer_types not in (None, pattern):
        _refuse("layer_types", f"every {period}th full_attention", config.layer_types, path)
    if config.sliding_window_pattern not in (None, period):
        _refuse("sliding_window_pattern", period, config.sliding_window_pattern, path)
    return {
        "query_head_dim_normalize": scalar == head_dim,
        "use_post_ffw_norm": not vault,
        "use_post_attention_norm": not vault,
        "final_logit_soft_cap": config.final_logit_softcapping,
        "attention_logit_soft_cap": config.attn_logit_softcapping,
        "use_sliding_window_attention": windowed,
        **({"sliding_window_size": config.sliding_window} if windowed else {}),
    }


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
        # The plain form scales nothing, in transformers too, whatever its factor.
        factor = (rope.factor or 1.0) if form != "default" else 1.0
        if (form == "linear" and rope.factor is None) or (rope.rope_type or rope.type or form) != (rope.type or form):
            _refuse(f"rope scaling of {kind}", "one rope_type with its factor", {**older, **given}, path)
        if rope.factor not in (None, 1) and not (rope.rope_type or rope.type):
            _refuse(f"rope scaling of {kind}", "a rope_type with its factor", {**older, **given}, path)
        if rope.partial_rotary_factor not in (None, 1):
            _refuse("partial_rotary_factor", 1, rope.partial_rotary_factor, path)
        stated = config.rope_theta if kind == "full_attention" else getattr(config, "rope_local_base_freq", None)
        if rope.rope_theta and stated not in (None, rope.rope_theta):
            raise StageError(
                f"{path} must state one rope_theta of {kind}. Received: {brief(stated)} and {brief(rope.rope_theta)}"
            )
        found[kind] = (rope.rope_theta or wavelength, float(factor), form)
    return found
