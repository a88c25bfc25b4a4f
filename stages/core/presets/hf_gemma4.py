"""The text configuration of a Gemma 4 at Hugging Face as the arguments of keras-hub's Gemma4Backbone.

Source of keys and of what a missing one means: transformers 5.23, `configuration_gemma4.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from stages.core.common.errors import StageError
from stages.core.presets.architecture import Architecture
from stages.core.presets.layer_kinds import GLOBAL_WAVELENGTH, LOCAL_WAVELENGTH
from stages.core.presets.untrusted import Count, Heads, HeadSize, InputSize, Layers, Positive, Size, Typed, brief, parse

Name = Literal["sliding_attention", "full_attention"]


class _Overrides(Typed):
    """What transformers 5 writes of a layer that differs from the others."""

    head_dim: HeadSize | None = None
    num_key_value_heads: Heads | None = None


class Gemma4Text(Typed):
    """Gemma4TextConfig; a key that is left out means transformers' default."""

    vocab_size: Size = 262144
    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: Layers = 30
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads = 4
    head_dim: HeadSize = 256
    rms_norm_eps: Positive = 1e-6
    rope_parameters: dict[str, Any] | None = None
    sliding_window: Size = 512
    layer_types: list[Name] | None = None
    final_logit_softcapping: Positive | None = None
    vocab_size_per_layer_input: Size = 262144
    hidden_size_per_layer_input: InputSize = 256
    attention_k_eq_v: bool = False
    num_kv_shared_layers: Count = 0
    enable_moe_block: bool = False
    use_double_wide_mlp: bool = False
    num_experts: Heads | None = None
    top_k_experts: Heads | None = None
    moe_intermediate_size: Size | None = None
    global_head_dim: HeadSize = 512
    num_global_key_value_heads: Heads | None = None
    per_layer_config: dict[str, _Overrides] | None = None


class _Rope(Typed):
    """How the rotary embeddings of one kind of layer are turned."""

    rope_theta: Positive | None = None
    rope_type: Literal["default", "linear", "proportional"] = "default"
    factor: Positive = 1.0
    partial_rotary_factor: Positive = 1.0


def read(config: Gemma4Text, path: Path) -> Architecture:
    """Return the architecture.

    Args:
        config: the text model's part.
        path: of the file, for messages.

    Raises:
        StageError: keras-hub's Gemma 4 cannot express something.
    """
    count = config.num_hidden_layers
    names: list[Name] = list(config.layer_types or ()) or [
        "sliding_attention" if number % 6 else "full_attention" for number in range(1, count + 1)
    ]
    # transformers makes it so, with a warning.
    names[-1] = "full_attention"
    head, keys = config.global_head_dim, config.num_global_key_value_heads if config.attention_k_eq_v else None
    if config.per_layer_config is not None:
        head, keys = _full_layers(config, names, path)
    if config.attention_k_eq_v:
        keys = keys or config.num_key_value_heads
    elif keys not in (None, config.num_key_value_heads):
        raise StageError(
            "A Gemma 4 whose full attention has key/value heads of its own must have attention_k_eq_v: true. "
            f"Received: num_key_value_heads={keys} in {path}."
        )
    local, full = (_rope(config, kind, path) for kind in ("sliding_attention", "full_attention"))
    return Architecture(
        "Gemma4Backbone",
        {
            "vocabulary_size": config.vocab_size,
            "image_size": None,
            "num_layers": count,
            "num_query_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "hidden_dim": config.hidden_size,
            "intermediate_dim": config.intermediate_size,
            "head_dim": config.head_dim,
            "global_head_dim": head,
            "num_global_key_value_heads": keys if config.attention_k_eq_v else None,
            "layer_norm_epsilon": config.rms_norm_eps,
            "final_logit_soft_cap": config.final_logit_softcapping,
            "use_sliding_window_attention": True,
            "sliding_window_size": config.sliding_window,
            "layer_types": names,
            "local_rope_wavelength": local.rope_theta or LOCAL_WAVELENGTH,
            "local_rope_scaling_factor": _factor(local),
            "global_rope_wavelength": full.rope_theta or GLOBAL_WAVELENGTH,
            "global_rope_scaling_factor": _factor(full),
            "global_rope_partial_rotary_factor": full.partial_rotary_factor,
            "num_kv_shared_layers": config.num_kv_shared_layers,
            "use_double_wide_mlp": config.use_double_wide_mlp,
            "hidden_size_per_layer_input": config.hidden_size_per_layer_input,
            "vocab_size_per_layer_input": (
                config.vocab_size_per_layer_input if config.hidden_size_per_layer_input else None
            ),
            "enable_moe_block": config.enable_moe_block,
            **(_experts(config, path) if config.enable_moe_block else {}),
            "vision_encoder": None,
            "audio_encoder": None,
        },
    )


def _experts(config: Gemma4Text, path: Path) -> dict[str, int]:
    """Return the arguments of a model with experts, whose numbers transformers has no defaults for."""
    named = {
        "num_experts": config.num_experts,
        "num_experts_per_token": config.top_k_experts,
        "expert_intermediate_dim": config.moe_intermediate_size,
    }
    if None in named.values():
        raise StageError(
            "A Gemma 4 with enable_moe_block must state num_experts, top_k_experts and moe_intermediate_size. "
            f"Received: {brief([config.num_experts, config.top_k_experts, config.moe_intermediate_size])} in {path}."
        )
    return {key: value for key, value in named.items() if value is not None}


def _full_layers(config: Gemma4Text, names: list[Name], path: Path) -> tuple[int, int | None]:
    """Return head size and key/value heads of full attention, of which all layers must have the same, and no other."""
    given = config.per_layer_config or {}
    wanted = {str(number) for number, name in enumerate(names) if name == "full_attention"}
    forms = {(each.head_dim, each.num_key_value_heads) for each in given.values()}
    if set(given) != wanted or len(forms) != 1:
        raise StageError(
            "per_layer_config of a Gemma 4 must give all layers of full attention, and no others, the same sizes. "
            f"Received: {brief(sorted(given))} with {len(forms)} forms in {path}."
        )
    head, keys = forms.pop()
    return head or config.head_dim, keys


def _rope(config: Gemma4Text, kind: str, path: Path) -> _Rope:
    """Return how a kind of layer is turned."""
    default: dict[str, Any] = {} if kind == "sliding_attention" else {"rope_type": "proportional"}
    if config.rope_parameters is None:
        return _Rope(**default, partial_rotary_factor=0.25 if default else 1.0)
    rope = parse(_Rope, config.rope_parameters.get(kind, {}), f"{path}: rope of {kind}")
    partial = rope.partial_rotary_factor != 1
    if partial != (rope.rope_type == "proportional" and partial) or (partial and kind == "sliding_attention"):
        raise StageError(
            "Only the full attention of a Gemma 4 turns a part of its heads, with rope_type: proportional. "
            f"Received: {brief(config.rope_parameters.get(kind))} for {kind} in {path}."
        )
    if rope.rope_theta is None:
        raise StageError(f"{path} must state rope_theta of {kind}, and does not.")
    return rope


def _factor(rope: _Rope) -> float:
    """Return what positions are divided by; the plain form scales nothing, whatever its factor."""
    return 1.0 if rope.rope_type == "default" else float(rope.factor)
