"""The public Gemma text checkpoints as keras-hub backbone arguments, with keras-hub's parameter counts."""

from __future__ import annotations

import functools
from typing import Any

from stages.core.architecture import Architecture
from stages.core.layout import Weight


def _gemma(
    params: int, vocabulary: int, layers: int, heads: int, kv: int, hidden: int, ffw: int, head: int, **more: Any
):
    return {
        "params": params,
        "vocabulary_size": vocabulary,
        "num_layers": layers,
        "num_query_heads": heads,
        "num_key_value_heads": kv,
        "hidden_dim": hidden,
        "intermediate_dim": ffw,
        "head_dim": head,
        **more,
    }


_POST = {"use_post_ffw_norm": True, "use_post_attention_norm": True, "use_sliding_window_attention": True}
_TWO = {**_POST, "final_logit_soft_cap": 30, "attention_logit_soft_cap": 50}
_THREE = {**_POST, "image_size": 896, "vision_encoder": None}

GEMMAS: dict[str, dict[str, Any]] = {
    "gemma_2b_en": _gemma(2506172416, 256000, 18, 8, 1, 2048, 32768, 256),
    "gemma_7b_en": _gemma(8537680896, 256000, 28, 16, 16, 3072, 49152, 256),
    "gemma2_2b_en": _gemma(2614341888, 256000, 26, 8, 4, 2304, 18432, 256, **_TWO),
    "gemma2_9b_en": _gemma(9241705984, 256000, 42, 16, 8, 3584, 28672, 256, **_TWO),
    "gemma2_27b_en": _gemma(27227128320, 256000, 46, 32, 16, 4608, 73728, 128, **_TWO),
    "gemma3_270m": _gemma(268098176, 262144, 18, 4, 1, 640, 2048, 256, **_THREE),
    "gemma3_1b": _gemma(999885952, 262144, 26, 4, 1, 1152, 6912, 256, **_THREE),
    "gemma3_4b_text": _gemma(3880099328, 262144, 34, 8, 4, 2560, 10240, 256, **_THREE),
    "gemma3_12b_text": _gemma(11765788416, 262144, 48, 16, 8, 3840, 15360, 256, **_THREE),
    "gemma3_27b_text": _gemma(27009002240, 262144, 62, 32, 16, 5376, 21504, 128, **_THREE),
}


def architecture(preset: str) -> Architecture:
    """A checkpoint's class and arguments."""
    arguments = {key: value for key, value in GEMMAS[preset].items() if key != "params"}
    return Architecture("Gemma3Backbone" if preset.startswith("gemma3") else "GemmaBackbone", arguments)


@functools.cache
def declared_weights(preset: str, rank: int = 0) -> list[Weight]:
    """A checkpoint's weights without values, with LoRA kernels on query and value if there is a rank."""
    from stages.core import lora
    from stages.core.architecture import build_backbone
    from stages.core.loading import weights_of

    backbone = build_backbone(architecture(preset), "float32")
    lora.declare(backbone, rank, None, ("query", "value"))
    return weights_of(backbone)
