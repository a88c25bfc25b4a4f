"""A Gemma's shape without its weights: the backbone's class and arguments.

Purpose: everything about a preset that layouts, loading and planning need before a byte of weights is read.
Reads: `config.json` of a keras-hub preset or of a Hugging Face folder, or the metadata of a GGUF file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.common.errors import StageError, shown
from stages.core.presets.untrusted import Heads, HeadSize, Layers, Positive, Size, Typed, brief, parse, read_object

EPSILON = 1e-6
"""keras-hub builds every block's norms with it, whatever the backbone's argument says."""

FLOATS = ("float32", "bfloat16", "float16", "float64", "mixed_bfloat16", "mixed_float16")


class _Gemma(Typed):
    """The arguments of keras-hub's GemmaBackbone, as far as `model/decoder.py` computes what they say."""

    vocabulary_size: Size
    num_layers: Layers
    num_query_heads: Heads
    num_key_value_heads: Heads
    hidden_dim: Size
    intermediate_dim: Size
    head_dim: HeadSize
    query_head_dim_normalize: bool = True
    use_post_ffw_norm: bool = False
    use_post_attention_norm: bool = False
    attention_logit_soft_cap: Positive | None = None
    final_logit_soft_cap: Positive | None = None
    use_sliding_window_attention: bool = False
    sliding_window_size: Size = 4096
    layer_norm_epsilon: Positive = EPSILON
    dropout: float = 0


class _Gemma3(_Gemma):
    """The arguments of Gemma3Backbone."""

    image_size: Size | None = None
    use_query_key_norm: bool = True
    local_rope_scaling_factor: Positive = 1.0
    global_rope_scaling_factor: Positive = 1.0
    vision_encoder: None = None
    use_bidirectional_attention: bool = False
    is_embedding_model: bool = False
    pooling_intermediate_dim: int | None = None
    embedding_dim: int | None = None


BACKBONES: dict[str, type[_Gemma]] = {"GemmaBackbone": _Gemma, "Gemma3Backbone": _Gemma3}

# Keras' own bookkeeping, none of the backbone's arguments; dtype is ours to choose.
BOOKKEEPING = ("name", "trainable", "dtype")


@dataclass(frozen=True)
class Architecture:
    """A keras-hub backbone class by name, and its arguments (without dtype)."""

    class_name: str
    config: dict[str, Any]

    def __post_init__(self) -> None:
        if self.class_name not in BACKBONES:
            raise StageError(
                f"The preset must be a text Gemma ({' or '.join(BACKBONES)}). "
                f"Received: backbone={shown(self.class_name)}."
            )
        if self.config.get("vision_encoder") is not None:
            raise StageError(
                "The preset must be a text model. Received: a Gemma with a vision encoder. Use its _text preset."
            )
        config = parse(BACKBONES[self.class_name], self.config, "The architecture of a Gemma")

        def need(holds: bool, key: str, allowed: str) -> None:
            if not holds:
                raise StageError(
                    f"The architecture of a Gemma that this project runs has {key} {allowed}. "
                    f"Received: {key}={getattr(config, key)}."
                )

        need(
            config.num_query_heads % config.num_key_value_heads == 0,
            "num_query_heads",
            f"a multiple of num_key_value_heads ({config.num_key_value_heads})",
        )
        by_head = config.query_head_dim_normalize or config.hidden_dim % config.num_query_heads == 0
        need(by_head, "hidden_dim", "that its heads divide")
        need(math.isclose(config.layer_norm_epsilon, EPSILON, rel_tol=1e-5), "layer_norm_epsilon", f"{EPSILON:g}")
        need(config.dropout == 0, "dropout", "0 (LoRA has its own: finetune.lora_dropout)")
        if isinstance(config, _Gemma3):
            need(not config.is_embedding_model, "is_embedding_model", "false: an embedding model predicts no tokens")
            for key in ("pooling_intermediate_dim", "embedding_dim"):
                need(getattr(config, key) is None, key, "null: an embedding model predicts no tokens")
            need(not config.use_bidirectional_attention, "use_bidirectional_attention", "false: it looks back only")
        else:
            need(config.intermediate_dim % 2 == 0, "intermediate_dim", "even: it counts both gates")


def read_architecture(folder: Path, file_format: str) -> Architecture:
    """Return the architecture of a preset folder.

    Args:
        folder: the folder with the preset's files.
        file_format: the manifest's: `keras`, `safetensors` (both have a `config.json`) or `gguf` (one `.gguf` file).

    Raises:
        StageError: the preset is not a text Gemma, has something that the forward pass does not compute, or its file
            is not there.
    """
    if file_format == "gguf":
        from stages.core.presets import gguf

        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise StageError(
                f"The preset folder must hold one .gguf file. Received: {len(files)} in {folder}. "
                "Run `python -m stages.fetch`."
            )
        found = gguf.read_architecture(files[0])
        return Architecture(found["class_name"], found["config"])
    if file_format == "safetensors":
        from stages.core.presets import hf_config

        found = hf_config.read_architecture(folder)
        return Architecture(found["class_name"], found["config"])
    content = read_object(folder / "config.json")
    if not isinstance(content.get("class_name"), str) or not isinstance(content.get("config"), dict):
        raise StageError(
            f"{folder / 'config.json'} must hold the class_name and config of a backbone. "
            f"Received: keys {shown(', '.join(content))}"
        )
    if unknown := content.keys() - KERAS_KEYS:
        raise StageError(
            f"{folder / 'config.json'} has a key that Keras does not write. Received: {shown(min(unknown))}"
        )
    arguments = content["config"]
    _refuse_quantized(arguments.get("dtype"))
    return Architecture(
        content["class_name"], {key: value for key, value in arguments.items() if key not in BOOKKEEPING}
    )


# What Keras and keras-hub's older presets write beside class and arguments; none of it is read.
KERAS_KEYS = {
    *("module", "class_name", "config", "registered_name", "build_config", "compile_config", "shared_object_id"),
    *("assets", "weights"),
}


def _refuse_quantized(dtype: Any) -> None:
    """Refuse a dtype policy under which the numbers in the file are not the weights.

    Raises:
        StageError: it is none of plain floats.
    """
    name = dtype
    if isinstance(dtype, dict) and dtype.get("class_name") == "DTypePolicy" and isinstance(dtype.get("config"), dict):
        name = dtype["config"].get("name")
    if name is not None and name not in FLOATS:
        raise StageError(
            f"The weights must be plain floats, not quantized: save the preset before `quantize`. "
            f"Received: dtype={brief(dtype)}"
        )
