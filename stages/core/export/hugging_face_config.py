"""The configuration files of a Hugging Face folder of Gemma, for transformers 5 and for the readers before it.

Source of keys and values: the configurations that transformers 5.23 and 4.5x write of Google's own checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.core.common.errors import StageError
from stages.core.files import write_json
from stages.core.presets.architecture import Architecture
from stages.core.presets.hf_config import read_architecture
from stages.core.presets.layer_kinds import GLOBAL_WAVELENGTH, LOCAL_WAVELENGTH
from stages.core.presets.untrusted import parse

CLASSES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
}
LATER = {"Gemma3Backbone": "gemma3_text", "Gemma4Backbone": "gemma4_text"}
COMMON = {"vocabulary_size", "hidden_dim", "intermediate_dim", "attention_logit_soft_cap", "final_logit_soft_cap"}
"""Arguments of a Gemma 4 that do not show in the kinds of its blocks."""
SAMPLING = {"do_sample": True, "top_k": 64, "top_p": 0.95}
"""How Google has Gemma 3 and 4 generate; the older ones' files name nothing."""


def model_type(architecture: Architecture) -> str:
    """Return transformers' name of the family."""
    if architecture.class_name in LATER:
        return LATER[architecture.class_name]
    return "gemma2" if architecture.config.get("use_post_attention_norm") else "gemma"


def context_length(architecture: Architecture) -> int:
    """Return how many tokens Google trained the model on: of Gemma 3 32768, or with scaled positions 131072.

    Of Gemma 4 the large ones, in whose full attention values are keys, were trained on 262144, the others on half.
    """
    if architecture.class_name == "Gemma4Backbone":
        return 262144 if any(kind.keys_are_values for kind in architecture.kinds) else 131072
    if architecture.class_name != "Gemma3Backbone":
        return 8192
    return 32768 if architecture.config.get("global_rope_scaling_factor", 1.0) == 1.0 else 131072


def query_scalar(architecture: Architecture) -> int:
    """Return the number whose root divides the queries: the head size, or in a 27B the hidden size over the heads."""
    config = architecture.config
    if config.get("query_head_dim_normalize", True):
        return config["head_dim"]
    return config["hidden_dim"] // config["num_query_heads"]


def config_of(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """Return the content of `config.json`, old keys beside the new ones."""
    given, kind = architecture.config, model_type(architecture)
    config = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": given["vocabulary_size"],
        "hidden_size": given["hidden_dim"],
        "intermediate_size": architecture.ffw_dim,
        "num_hidden_layers": given["num_layers"],
        "num_attention_heads": given["num_query_heads"],
        "num_key_value_heads": given["num_key_value_heads"],
        "head_dim": given["head_dim"],
        "max_position_embeddings": context_length(architecture),
        "rms_norm_eps": given.get("layer_norm_epsilon", 1e-6),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "dtype": dtype,
        "torch_dtype": dtype,
        "rope_theta": LOCAL_WAVELENGTH,
        "rope_parameters": {"rope_theta": LOCAL_WAVELENGTH, "rope_type": "default"},
    }
    if kind == "gemma":
        return {**config, "hidden_act": "gelu_pytorch_tanh"}
    if kind == "gemma4_text":
        return {key: value for key, value in config.items() if key != "rope_theta"} | _of_gemma4(architecture)
    period = 2 if kind == "gemma2" else 6
    layers = range(1, given["num_layers"] + 1)
    config |= {
        "query_pre_attn_scalar": query_scalar(architecture),
        "sliding_window": given.get("sliding_window_size", 4096),
        "layer_types": ["sliding_attention" if number % period else "full_attention" for number in layers],
        "final_logit_softcapping": _real(given.get("final_logit_soft_cap")),
        "attn_logit_softcapping": _real(given.get("attention_logit_soft_cap")),
    }
    return config if kind == "gemma2" else config | _rope_of_gemma3(given)


def _real(value: float | None) -> float | None:
    """Return a number as a real one: transformers 5 refuses a whole one for a soft cap."""
    return None if value is None else float(value)


def _rope_of_gemma3(given: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary embeddings of both kinds of layers, and their old keys."""
    factor = float(given.get("global_rope_scaling_factor", 1.0))
    scaling: dict[str, Any] = {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    return {
        "sliding_window_pattern": 6,
        "rope_theta": GLOBAL_WAVELENGTH,
        "rope_local_base_freq": LOCAL_WAVELENGTH,
        "rope_scaling": None if factor == 1.0 else scaling,
        "rope_parameters": {
            "full_attention": {"rope_theta": GLOBAL_WAVELENGTH, **scaling},
            "sliding_attention": {"rope_theta": LOCAL_WAVELENGTH, "rope_type": "default"},
        },
    }


def _of_gemma4(architecture: Architecture) -> dict[str, Any]:
    """Return what sets the configuration of a Gemma 4 apart; of a kind that no block is of, transformers' defaults."""
    given, kinds = architecture.config, {kind.name: kind for kind in architecture.kinds}
    full, local = kinds.get("full_attention"), kinds.get("sliding_attention")
    experts = architecture.kinds[0].experts
    rope: dict[str, Any] = {}
    for name, kind, wavelength in (
        ("full_attention", full, GLOBAL_WAVELENGTH),
        ("sliding_attention", local, LOCAL_WAVELENGTH),
    ):
        rope[name] = {"rope_theta": kind.wavelength if kind else wavelength, "rope_type": "default"}
        if kind and kind.turned < kind.head // 2:
            share = given["global_rope_partial_rotary_factor"]
            rope[name] |= {"rope_type": "proportional", "partial_rotary_factor": float(share)}
        elif kind and kind.rope_scaling != 1.0:
            rope[name]["rope_type"] = "linear"
        if kind and kind.rope_scaling != 1.0:
            rope[name]["factor"] = kind.rope_scaling
    return {
        "head_dim": given["head_dim"],
        "global_head_dim": full.head if full else given["head_dim"],
        "attention_k_eq_v": full is not None and full.keys_are_values,
        "num_global_key_value_heads": given.get("num_global_key_value_heads"),
        "sliding_window": given.get("sliding_window_size", architecture.family.window),
        "layer_types": [kind.name for kind in architecture.kinds],
        "final_logit_softcapping": _real(given.get("final_logit_soft_cap")),
        "rope_parameters": rope,
        "hidden_size_per_layer_input": given.get("hidden_size_per_layer_input", 0),
        "vocab_size_per_layer_input": given["vocabulary_size"],
        "num_kv_shared_layers": given.get("num_kv_shared_layers", 0),
        "enable_moe_block": experts is not None,
        "num_experts": experts and experts.count,
        "top_k_experts": experts and experts.chosen,
        "moe_intermediate_size": experts and experts.width,
        "use_double_wide_mlp": given.get("use_double_wide_mlp", False),
        "use_bidirectional_attention": None,
    }


def write_config(folder: Path, architecture: Architecture, dtype: str) -> None:
    """Write `config.json`, and check that it says what the architecture says.

    Raises:
        StageError: transformers' Gemma cannot express something; names the argument.
    """
    write_json(folder / "config.json", config_of(architecture, dtype))
    schema, written = architecture.family.arguments, read_architecture(folder)
    wanted, found = (
        parse(schema, {key: value for key, value in each.config.items() if key != "image_size"}, "The architecture")
        for each in (architecture, written)
    )
    # A window without windowed attention says nothing, nor whether queries are divided by heads of the same size.
    silent = {"sliding_window_size"} if not wanted.use_sliding_window_attention else set()
    silent |= {"query_head_dim_normalize"} if query_scalar(architecture) == query_scalar(written) else set()
    if architecture.class_name == "Gemma4Backbone":
        # What its blocks are can be said in several ways.
        if architecture.kinds != written.kinds:
            raise StageError(
                "A Gemma 4 of transformers cannot have these blocks: this model cannot be written for it. "
                f"Received: {sorted(set(architecture.kinds) - set(written.kinds), key=repr)}. "
                "Leave huggingface out of export.formats."
            )
        silent |= schema.model_fields.keys() - COMMON
    for key in schema.model_fields.keys() - silent:
        if getattr(wanted, key) != getattr(found, key):
            raise StageError(
                f"A Gemma of transformers has {key}={getattr(found, key)}: this model cannot be written for it. "
                f"Received: {key}={getattr(wanted, key)}. Leave huggingface out of export.formats."
            )


def write_generation_config(folder: Path, architecture: Architecture, ends: Sequence[int]) -> None:
    """Write `generation_config.json`.

    Args:
        folder: to write to.
        architecture: of the model.
        ends: tokens that end a generation: `<eos>`, and `<end_of_turn>` of a model that answers in turns.
    """
    sampling = SAMPLING if architecture.class_name in LATER else {}
    tokens = {"bos_token_id": 2, "eos_token_id": list(ends), "pad_token_id": 0}
    write_json(folder / "generation_config.json", {**tokens, **sampling})
