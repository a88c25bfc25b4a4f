"""The public Gemma text checkpoints as architectures, so that one can be laid over a mesh before it is downloaded.

Purpose: `python -m stages.load --dry-run --preset NAME`, and planning. Reads nothing.
"""

from __future__ import annotations

from typing import Any

from stages.core.common.errors import ParamsError
from stages.core.fetch.catalog import name_of, registered
from stages.core.presets.architecture import Architecture


def _gemma(
    params: int, vocabulary: int, layers: int, heads: int, kv: int, hidden: int, ffw: int, head: int, **more: Any
) -> dict[str, Any]:
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
_TWO = {**_POST, "final_logit_soft_cap": 30, "attention_logit_soft_cap": 50, "sliding_window_size": 4096}
_THREE = {**_POST, "image_size": 896, "vision_encoder": None}
_SMALL = {**_THREE, "sliding_window_size": 512}
_LARGE = {**_THREE, "sliding_window_size": 1024, "global_rope_scaling_factor": 8.0}
_PER_HEAD = {"query_head_dim_normalize": False}

GEMMAS: dict[str, dict[str, Any]] = {
    "gemma_2b_en": _gemma(2506172416, 256000, 18, 8, 1, 2048, 32768, 256),
    "gemma_7b_en": _gemma(8537680896, 256000, 28, 16, 16, 3072, 49152, 256),
    "gemma2_2b_en": _gemma(2614341888, 256000, 26, 8, 4, 2304, 18432, 256, **_TWO),
    "gemma2_9b_en": _gemma(9241705984, 256000, 42, 16, 8, 3584, 28672, 256, **_TWO),
    "gemma2_27b_en": _gemma(27227128320, 256000, 46, 32, 16, 4608, 73728, 128, **_TWO, **_PER_HEAD),
    "gemma3_270m": _gemma(268098176, 262144, 18, 4, 1, 640, 2048, 256, **_SMALL),
    "gemma3_1b": _gemma(999885952, 262144, 26, 4, 1, 1152, 6912, 256, **_SMALL),
    "gemma3_4b_text": _gemma(3880099328, 262144, 34, 8, 4, 2560, 10240, 256, **_LARGE),
    "gemma3_12b_text": _gemma(11765788416, 262144, 48, 16, 8, 3840, 15360, 256, **_LARGE),
    "gemma3_27b_text": _gemma(27009002240, 262144, 62, 32, 16, 5376, 21504, 128, **_LARGE, **_PER_HEAD),
}
"""By keras-hub's preset name: `params`, the parameter count that keras-hub's own registry states
(`GemmaBackbone.presets`, `Gemma3Backbone.presets`), and the arguments of the backbone, as in the `config.json` of the
checkpoint. GemmaBackbone counts both gate matrices in `intermediate_dim`, Gemma3Backbone counts one."""


def architecture(preset: str, asked_by: str = "--preset") -> Architecture:
    """Return a public checkpoint's class and arguments.

    Args:
        preset: keras-hub's name, or a handle that ends in it; instruction-tuned and other tuned forms have the
            architecture of their base.
        asked_by: the option or setting that named it, for the message.

    Raises:
        ParamsError: no text Gemma of this name, with the nearest; or one whose configuration is not known here.
    """
    like = registered(preset, asked_by).like
    if like is None:
        raise ParamsError(
            f"The configuration of {name_of(preset)} is known only from its files. Received: {asked_by}={preset}\n"
            "Fetch it first; then `python -m stages.load --dry-run` shows it without --preset, and plan takes its "
            "folder with fetch.source: path."
        )
    arguments = {key: value for key, value in GEMMAS[like].items() if key != "params"}
    return Architecture("Gemma3Backbone" if like.startswith("gemma3") else "GemmaBackbone", arguments)
