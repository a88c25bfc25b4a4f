"""A model's hyper-parameters as a GGUF file states them.

Source of names, keys and of what llama.cpp takes for granted: its `conversion/gemma.py` and `src/models`.
"""

from __future__ import annotations

from typing import Any

import gguf

from stages.core.common.errors import StageError
from stages.core.export.hugging_face_config import context_length
from stages.core.presets.architecture import EPSILON, Architecture
from stages.core.presets.gguf_architecture import BLOCKS_OF_27B, GLOBAL_ROPE_WAVELENGTH
from stages.core.presets.gguf_gemma4 import check_sharing
from stages.core.presets.layer_kinds import LOCAL_WAVELENGTH


def architecture_name(architecture: Architecture) -> str:
    """Return what llama.cpp calls a family: `gemma`, `gemma2`, `gemma3` or `gemma4`.

    Raises:
        StageError: the model has something that llama.cpp's does not have, or lacks something that it takes for
            granted; names it. The file would compute another model, in silence.
    """
    config = architecture.config
    if architecture.class_name == "Gemma4Backbone":
        name, wanted = "gemma4", _of_gemma4(architecture)
    else:
        gemma3 = architecture.class_name == "Gemma3Backbone"
        name = "gemma3" if gemma3 else "gemma2" if config.get("use_post_attention_norm") else "gemma"
        wanted = _of_gemma(architecture, name)
    for key, (expected, default) in wanted.items():
        value = config.get(key, default)
        if value != expected and (expected != "a number" or value is None):
            raise StageError(
                f"llama.cpp's {name} of {config['num_layers']} blocks has {key}={expected}. Received: {key}={value}\n"
                "Leave gguf out of export.formats: the file would compute another model."
            )
    return name


def _of_gemma(architecture: Architecture, name: str) -> dict[str, tuple[Any, Any]]:
    """Return what llama.cpp takes for granted of a Gemma 1, 2 or 3, and what a missing argument means."""
    config, gemma3, windowed = architecture.config, name == "gemma3", name != "gemma"
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
    return wanted


def _of_gemma4(architecture: Architecture) -> dict[str, tuple[Any, Any]]:
    """Return the same of a Gemma 4, and check which blocks share keys and values."""
    check_sharing(architecture, "the model\nLeave gguf out of export.formats: the file would compute another model.")
    return {
        "use_sliding_window_attention": (True, True),
        "attention_logit_soft_cap": (None, None),
        "final_logit_soft_cap": ("a number", None),
        "local_rope_scaling_factor": (1.0, 1.0),
        "global_rope_scaling_factor": (1.0, 1.0),
    }


def add_sizes(writer: gguf.GGUFWriter, name: str, architecture: Architecture) -> None:
    """State the hyper-parameters; `name` is the family's in llama.cpp."""
    config = architecture.config
    writer.add_context_length(context_length(architecture))
    writer.add_embedding_length(config["hidden_dim"])
    writer.add_block_count(config["num_layers"])
    writer.add_head_count(config["num_query_heads"])
    writer.add_layer_norm_rms_eps(EPSILON)
    if name == "gemma4":
        _add_kinds(writer, architecture)
        return
    writer.add_feed_forward_length(architecture.ffw_dim)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    if name == "gemma":
        return
    writer.add_sliding_window(config.get("sliding_window_size", 4096))
    if name == "gemma2":
        writer.add_attn_logit_softcapping(float(config["attention_logit_soft_cap"]))
        writer.add_final_logit_softcapping(float(config["final_logit_soft_cap"]))
        return
    writer.add_rope_freq_base(GLOBAL_ROPE_WAVELENGTH)
    writer.add_rope_freq_base_swa(LOCAL_WAVELENGTH)
    if (factor := config.get("global_rope_scaling_factor", 1.0)) != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(factor))


def _add_kinds(writer: gguf.GGUFWriter, architecture: Architecture) -> None:
    """State what a Gemma 4's blocks are; of a kind that no block is of, what the other has."""
    config, kinds = architecture.config, architecture.kinds
    windowed = [kind.window is not None for kind in kinds]
    local, full = (next((kind for kind in kinds if (kind.window is None) == each), kinds[0]) for each in (False, True))
    writer.add_feed_forward_length([kind.ffw for kind in kinds])
    writer.add_head_count_kv([kind.key_heads for kind in kinds])
    writer.add_key_length(full.head)
    writer.add_value_length(full.head)
    writer.add_key_length_swa(local.head)
    writer.add_value_length_swa(local.head)
    writer.add_rope_dimension_count(full.head)
    writer.add_rope_dimension_count_swa(local.head)
    writer.add_rope_freq_base(full.wavelength)
    writer.add_rope_freq_base_swa(local.wavelength)
    writer.add_sliding_window(config.get("sliding_window_size", architecture.family.window))
    writer.add_sliding_window_pattern(windowed)
    writer.add_shared_kv_layers(sum(kind.keys_of is not None for kind in kinds))
    writer.add_embedding_length_per_layer_input(kinds[0].layer_input)
    writer.add_final_logit_softcapping(float(config["final_logit_soft_cap"]))
    if (experts := kinds[0].experts) is not None:
        writer.add_expert_count(experts.count)
        writer.add_expert_used_count(experts.chosen)
        writer.add_expert_feed_forward_length(experts.width)
