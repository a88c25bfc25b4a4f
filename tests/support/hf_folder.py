"""A tiny preset rewritten by hand as a Hugging Face folder: `config.json`, safetensors and `tokenizer.model`.

The names and shapes are those of the public checkpoints (PyTorch's linear layers: outputs x inputs, heads one after the
other); written from those, not from the reader under test.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save, save_file

from stages.core.presets.architecture import Architecture
from stages.core.presets.weight_table import weight_table
from tests.support.tiny_presets import CONFIGS, tiny_proto

MODEL_TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text", "gemma4": "gemma4_text"}


def config_of(family: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a public checkpoint of the family, in the form of transformers 4."""
    config = {
        "architectures": ["GemmaForCausalLM"],
        "model_type": MODEL_TYPES[family],
        "vocab_size": arguments["vocabulary_size"],
        "num_hidden_layers": arguments["num_layers"],
        "num_attention_heads": arguments["num_query_heads"],
        "num_key_value_heads": arguments["num_key_value_heads"],
        "hidden_size": arguments["hidden_dim"],
        "intermediate_size": arguments["intermediate_dim"] // (1 if family in ("gemma3", "gemma4") else 2),
        "head_dim": arguments["head_dim"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
    if family == "gemma":
        return config | {"hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None}
    if family == "gemma4":
        return config_of_gemma4(arguments, config)
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": arguments["head_dim"],
        "sliding_window": arguments["sliding_window_size"],
        "attn_logit_softcapping": arguments.get("attention_logit_soft_cap"),
        "final_logit_softcapping": arguments.get("final_logit_soft_cap"),
    }
    if family == "gemma2":
        return config
    return config | {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 6,
    }


def config_of_gemma4(arguments: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of Gemma 4 has besides, in the form of Google's own files."""
    rope = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}
    every = arguments["sliding_window_pattern"]
    del config["rope_theta"]
    return config | {
        "architectures": ["Gemma4ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "global_head_dim": arguments["global_head_dim"],
        "num_global_key_value_heads": arguments["num_global_key_value_heads"],
        "attention_k_eq_v": arguments["num_global_key_value_heads"] is not None,
        "layer_types": arguments.get("layer_types")
        or [
            "sliding_attention" if number % every else "full_attention"
            for number in range(1, arguments["num_layers"] + 1)
        ],
        "sliding_window": arguments["sliding_window_size"],
        "final_logit_softcapping": float(arguments["final_logit_soft_cap"]),
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "hidden_size_per_layer_input": arguments.get("hidden_size_per_layer_input", 0),
        "vocab_size_per_layer_input": arguments["vocabulary_size"],
        "num_kv_shared_layers": arguments.get("num_kv_shared_layers", 0),
        "use_double_wide_mlp": arguments.get("use_double_wide_mlp", False),
        "enable_moe_block": arguments.get("enable_moe_block", False),
        "num_experts": arguments.get("num_experts"),
        "top_k_experts": arguments.get("num_experts_per_token"),
        "moe_intermediate_size": arguments.get("expert_intermediate_dim"),
        "use_bidirectional_attention": "vision",
    }


def tensors_of(family: str, weights: dict[str, np.ndarray], prefix: str = "model.") -> dict[str, np.ndarray]:
    """Tensors by their public names, from weights by keras-hub's paths."""
    norms = {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_ffw_norm": "post_attention_layernorm" if family == "gemma" else "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "query_norm": "self_attn.q_norm",
        "key_norm": "self_attn.k_norm",
        "post_per_layer_input_norm": "post_per_layer_input_norm",
    }
    norms |= {
        "pre_ffw_norm_moe": "pre_feedforward_layernorm_2",
        "post_ffw_norm_dense": "post_feedforward_layernorm_1",
        "post_ffw_norm_moe_path": "post_feedforward_layernorm_2",
    }
    heads = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    linear = {"ffw_gating": "gate_proj", "ffw_gating_2": "up_proj", "ffw_linear": "down_proj"}
    linear = {layer: f"mlp.{name}" for layer, name in linear.items()}
    linear |= {"per_layer_input_gate": "per_layer_input_gate", "per_layer_up_proj": "per_layer_projection"}
    of_model = {
        "token_embedding": "embed_tokens",
        "final_normalization": "norm",
        "per_layer_token_embedding": "embed_tokens_per_layer",
        "per_layer_model_projection": "per_layer_model_projection",
        "per_layer_projection_norm": "per_layer_projection_norm",
    }
    tensors = {}
    for path, value in weights.items():
        layer = path.split("/")[-2]
        if layer in of_model:
            name, value = of_model[layer], value.T if path.endswith("kernel") else value
        else:
            block = path.split("/")[0].removeprefix("decoder_block_")
            if path.endswith("/layer_scalar"):
                tensors[f"{prefix}layers.{block}.layer_scalar"] = np.reshape(value, (1,))
                continue
            if "/moe_" in path:
                tensors |= experts_of(path, weights, f"{prefix}layers.{block}.")
                continue
            if layer in norms:
                name = norms[layer]
            elif layer in heads:
                name, value = f"self_attn.{heads[layer]}", np.concatenate([head.T for head in value])
            elif layer == "attention_output":
                name, value = "self_attn.o_proj", np.concatenate(list(value)).T
            else:
                name, value = linear[layer], value.T
            name = f"layers.{block}.{name}"
        tensors[f"{prefix}{name}.weight"] = np.ascontiguousarray(value)
    return tensors


def experts_of(path: str, weights: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensor of a router or of its experts; the gates and the matrices beside them are one, of each expert."""
    value, (layer, name) = weights[path], path.rsplit("/", 2)[-2:]
    if layer == "proj":
        return {f"{prefix}router.proj.weight": np.ascontiguousarray(value.T)}
    if name in ("per_dim_scale", "per_expert_scale"):
        return {f"{prefix}router.{name.removeprefix('per_dim_')}": value}
    if name == "down_proj":
        return {f"{prefix}experts.down_proj": np.ascontiguousarray(value.transpose(0, 2, 1))}
    both = [weights[path.replace(name, each)] for each in ("gate_proj", "up_proj")]
    joined = [np.concatenate([gate.T, up.T]) for gate, up in zip(*both, strict=True)]
    return {f"{prefix}experts.gate_up_proj": np.ascontiguousarray(np.stack(joined))}


def write_hugging_face(
    preset: Path, folder: Path, family: str, *, files: int = 1, dtype: str = "float32", prefix: str = "model."
) -> Path:
    """Rewrite a tiny keras-hub preset as a Hugging Face folder, in one weights file or several with an index."""
    import keras_hub

    folder.mkdir()
    backbone = keras_hub.models.Backbone.from_preset(str(preset), dtype="float32")
    arguments = json.loads((preset / "config.json").read_text())["config"]
    (folder / "config.json").write_text(json.dumps(config_of(family, arguments)))
    weights = {weight.path: np.asarray(weight.value) for weight in backbone.weights}
    tensors = {name: value.astype(dtype) for name, value in tensors_of(family, weights, prefix).items()}
    shutil.copy(preset / "assets/tokenizer/vocabulary.spm", folder / "tokenizer.model")
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::files]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def hugging_face_files(files: int = 1, padding: int = 0) -> dict[str, bytes]:
    """The files of a tiny Gemma 3 as a hub has them, made without Keras; padding bytes make the first file larger."""
    architecture = Architecture("Gemma3Backbone", CONFIGS["gemma3"])
    weights = {path: np.full(each.shape, 2.0, "f4") for path, each in weight_table(architecture).items()}
    tensors = tensors_of("gemma3", weights)
    content = {
        "config.json": json.dumps(config_of("gemma3", CONFIGS["gemma3"])).encode(),
        "tokenizer.model": tiny_proto(),
    }
    if files == 1:
        return content | {"model.safetensors": save(tensors, {"padding": "x" * padding})}
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::files]}
        content[name] = save(part)
        weight_map |= dict.fromkeys(part, name)
    return content | {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


def change_config(folder: Path, **values: Any) -> Path:
    """Change entries of a folder's `config.json`; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder
