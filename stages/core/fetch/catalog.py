"""The text Gemmas that keras-hub knows by name: where Kaggle has them, how large they are, under which license, and
their architectures.

One lookup for `fetch`, `plan` and `load --dry-run`, without importing keras-hub, which takes seconds; a test holds it
to the registry of the pinned keras-hub (`GemmaBackbone.presets`, `Gemma3Backbone.presets`, `Gemma4Backbone.presets`).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from stages.core.common.errors import ParamsError
from stages.core.presets.architecture import Architecture
from stages.core.presets.manifest import LICENSE
from stages.core.records.manifest import License

_NAME = r"[A-Za-z0-9_][\w.-]*"  # of an owner, a model or a variation; never `..`
HANDLE = re.compile(
    rf"kaggle://(?P<model>{_NAME}/{_NAME}/keras/(?P<variation>{_NAME})/(?P<version>[1-9]\d*))", re.ASCII
)

HEALTH = License(
    "Health AI Developer Foundations Terms of Use",
    "https://developers.google.com/health-ai-developer-foundations/terms",
)
# What is known where the terms could not be read: where they are published.
CELL2SENTENCE = License("terms on the model's page", "https://www.kaggle.com/models/keras/cell2sentence")


@dataclass(frozen=True)
class Registered:
    """A text Gemma of keras-hub's registry.

    Attributes:
        handle: at Kaggle, with its version.
        parameters: their number, as the registry states it: of Gemma 4 rounded, and with the towers.
        like: the preset whose architecture it shares, by its name in `GEMMAS`.
        license: the terms its weights come under.
    """

    handle: str
    parameters: int
    like: str
    license: License


def _presets(
    folder: str, parameters: int, like: str, license: License = LICENSE, /, **versions: int
) -> dict[str, Registered]:
    """Return presets that differ in name and version only."""
    return {
        name: Registered(f"kaggle://{folder}/keras/{name}/{version}", parameters, like, license)
        for name, version in versions.items()
    }


REGISTRY: dict[str, Registered] = {
    **_presets(
        "keras/gemma",
        2506172416,
        "gemma_2b_en",
        **{"gemma_2b_en": 3, "gemma_instruct_2b_en": 3, "gemma_1.1_instruct_2b_en": 4},
    ),
    **_presets(
        "keras/gemma",
        8537680896,
        "gemma_7b_en",
        **{"gemma_7b_en": 4, "gemma_instruct_7b_en": 4, "gemma_1.1_instruct_7b_en": 5},
    ),
    **_presets("keras/codegemma", 2506172416, "gemma_2b_en", **{"code_gemma_2b_en": 2, "code_gemma_1.1_2b_en": 2}),
    **_presets(
        "keras/codegemma",
        8537680896,
        "gemma_7b_en",
        **{"code_gemma_7b_en": 3, "code_gemma_instruct_7b_en": 3, "code_gemma_1.1_instruct_7b_en": 3},
    ),
    **_presets("keras/gemma2", 2614341888, "gemma2_2b_en", gemma2_2b_en=2, gemma2_instruct_2b_en=2),
    **_presets("keras/gemma2", 9241705984, "gemma2_9b_en", gemma2_9b_en=4, gemma2_instruct_9b_en=4),
    **_presets("keras/gemma2", 27227128320, "gemma2_27b_en", gemma2_27b_en=3, gemma2_instruct_27b_en=3),
    **_presets("google/shieldgemma", 2614341888, "gemma2_2b_en", shieldgemma_2b_en=2),
    **_presets("google/shieldgemma", 9241705984, "gemma2_9b_en", shieldgemma_9b_en=2),
    **_presets("google/shieldgemma", 27227128320, "gemma2_27b_en", shieldgemma_27b_en=2),
    **_presets("keras/cell2sentence", 2614341888, "gemma2_2b_en", CELL2SENTENCE, c2s_scale_gemma_2_2b_en=1),
    **_presets("keras/cell2sentence", 27227128320, "gemma2_27b_en", CELL2SENTENCE, c2s_scale_gemma_2_27b_en=1),
    **_presets("keras/vaultgemma", 1038741120, "vault_gemma_1b_en", vault_gemma_1b_en=2),
    **_presets("keras/gemma3", 268098176, "gemma3_270m", gemma3_270m=3, gemma3_instruct_270m=4),
    **_presets("keras/gemma3", 999885952, "gemma3_1b", gemma3_1b=3, gemma3_instruct_1b=3),
    **_presets("keras/gemma3", 3880099328, "gemma3_4b_text", gemma3_4b_text=2, gemma3_instruct_4b_text=3),
    **_presets("keras/gemma3", 11765788416, "gemma3_12b_text", gemma3_12b_text=3, gemma3_instruct_12b_text=3),
    **_presets("keras/gemma3", 27009002240, "gemma3_27b_text", gemma3_27b_text=4, gemma3_instruct_27b_text=3),
    **_presets("keras/function-gemma", 268098176, "gemma3_270m", function_gemma_instruct_270m=1),
    **_presets("keras/medgemma", 27009002240, "gemma3_27b_text", HEALTH, medgemma_instruct_27b_text=1),
    **_presets("keras/gemma4", 26000000000, "gemma4_26b_a4b", gemma4_26b_a4b=2, gemma4_instruct_26b_a4b=2),
    **_presets("keras/gemma4", 5100000000, "gemma4_2b", gemma4_2b=2, gemma4_instruct_2b=2),
    **_presets("keras/gemma4", 7900000000, "gemma4_4b", gemma4_4b=2, gemma4_instruct_4b=2),
    **_presets("keras/gemma4", 31000000000, "gemma4_31b", gemma4_31b=2, gemma4_instruct_31b=2),
}
"""By keras-hub's preset name. A tuned form (instruct, 1.1, CodeGemma, ShieldGemma, C2S, MedGemma's text model) has the
architecture, and the number of parameters, of the preset that it was tuned from."""

BACKBONES = {"gemma3": "Gemma3Backbone", "gemma4": "Gemma4Backbone"}
"""By how the names of presets begin; of others it is GemmaBackbone."""

BASE = re.compile(r"gemma-(2b|7b|2-(2b|9b|27b)|3-270m|3-(1b|4b|12b|27b)-pt|4-(31[bB]|26[bB]-[aA]4[bB]|[eE][24][bB]))")
"""Names of Google's base models at Hugging Face, those that are not instruction-tuned (`-it`)."""

VISION = {
    "gemma3_4b": "gemma3_4b_text",
    "gemma3_instruct_4b": "gemma3_instruct_4b_text",
    "gemma3_12b": "gemma3_12b_text",
    "gemma3_instruct_12b": "gemma3_instruct_12b_text",
    "gemma3_27b": "gemma3_27b_text",
    "gemma3_instruct_27b": "gemma3_instruct_27b_text",
    "medgemma_4b": "hf://google/medgemma-4b-pt",
    "medgemma_instruct_4b": "hf://google/medgemma-4b-it",
    "medgemma_1.5_instruct_4b": "hf://google/medgemma-1.5-4b-it",
    "medgemma_instruct_27b": "medgemma_instruct_27b_text",
    "translategemma_4b_it": "hf://google/translategemma-4b-it",
    "translategemma_12b_it": "hf://google/translategemma-12b-it",
    "translategemma_27b_it": "hf://google/translategemma-27b-it",
}
"""Presets of the same backbones with a vision tower, each with its text preset; where there is none, with the plain
checkpoint, of which the text model alone is read."""

EMBEDDING = ("embedding_gemma3_300m", "harrier_embedding_oss_270m")
"""Presets of the same backbones that give a text one vector and predict no token."""

ASSISTANTS = "_assistant"
"""How the names of presets end that draft tokens for another model and have no keys and values of their own."""

OTHERS = {"gemma3n": "Gemma 3n", "pali_gemma": "PaliGemma", "t5gemma": "T5Gemma"}
"""Families of keras-hub with backbones of their own, by what their presets' names begin with."""


def registered(preset: str, asked_by: str) -> Registered:
    """Look a text Gemma up.

    Args:
        preset: keras-hub's name, or a handle that ends in one (`kaggle://keras/gemma3/keras/gemma3_1b/3`,
            `hf://keras/gemma3_1b`).
        asked_by: the option or setting that named it, for the message.

    Raises:
        ParamsError: not a text Gemma of the registry; the error says why, or names the nearest.
    """
    name = name_of(preset)
    if name in REGISTRY:
        return REGISTRY[name]
    received = f"Received: {asked_by}={preset}"
    if name in VISION:
        text = f"Its text preset is {VISION[name]}."
        if VISION[name].startswith("hf://"):
            text = f"Of its plain checkpoint the text model is read: fetch.source=huggingface, {VISION[name]}."
        raise ParamsError(f"{asked_by} must be a text Gemma, and {name} has a vision tower. {received}\n{text}")
    if name in EMBEDDING:
        raise ParamsError(
            f"{asked_by} must be a text Gemma that predicts tokens, and {name} is an embedding model without a "
            f"language head. {received}\nThe base model of its size is gemma3_270m."
        )
    if name.startswith("gemma4") and name.endswith(ASSISTANTS):
        raise ParamsError(
            f"{asked_by} must be a text Gemma by itself, and {name} only drafts tokens for another model, whose keys "
            f"and values it reads. {received}\nThe model itself is {name.removesuffix(ASSISTANTS)}."
        )
    for prefix, family in OTHERS.items():
        if name.startswith(prefix):
            raise ParamsError(
                f"{asked_by} must be a text Gemma 1, 2, 3 or 4, and {family} has another architecture. {received}\n"
                "Choose one such as gemma3_1b."
            )
    nearest = [each for each in REGISTRY if each.startswith(name)][:3]
    nearest = nearest or difflib.get_close_matches(name, REGISTRY, n=3, cutoff=0.4)
    raise ParamsError(
        f"{asked_by} must be a text Gemma by keras-hub's name. {received}\n"
        + (f"Did you mean {' or '.join(nearest)}?" if nearest else f"There are {', '.join(REGISTRY)}.")
    )


def name_of(preset: str) -> str:
    """Return the registry's name within a handle of the registry's own publishers, else the preset as it is."""
    if (match := HANDLE.fullmatch(preset)) and match["model"].startswith(("keras/", "google/")):
        return match["variation"]
    if preset.startswith("hf://keras/"):
        return preset.removeprefix("hf://keras/").partition("@")[0]
    return preset


def is_base(preset: str) -> bool:
    """Return whether a preset is known to be a base model, which no dialogue was trained into; unknown ones are not.

    Args:
        preset: keras-hub's name, or a handle; of one at Hugging Face the model's name counts, whoever hands it on.
    """
    name = name_of(preset)
    if name in REGISTRY:
        return REGISTRY[name].like == name
    handle, _, _ = name.partition("@")
    return handle.startswith("hf://") and BASE.fullmatch(handle.rpartition("/")[2]) is not None


def kaggle_handle(preset: str) -> tuple[str, int]:
    """Return a preset's handle at Kaggle with its version, and its number of parameters (0 when not known).

    Raises:
        ParamsError: not a text Gemma of keras-hub's registry, nor a whole handle; the message names the nearest.
    """
    if "/" not in preset:
        found = registered(preset, "fetch.preset")
        return found.handle, found.parameters
    match = HANDLE.fullmatch(preset)
    if not match:
        raise ParamsError(
            "fetch.preset must be a name of keras-hub's registry or kaggle://owner/model/keras/variation/version. "
            f"Received: fetch.preset={preset}"
        )
    name = name_of(preset)
    if name in REGISTRY or name in VISION or name in EMBEDDING:
        return preset, registered(preset, "fetch.preset").parameters
    return preset, 0


def license_of(preset: str) -> License:
    """Return the terms of a preset at Kaggle, given by name or handle."""
    name = name_of(preset)
    if name in REGISTRY:
        return REGISTRY[name].license
    match = HANDLE.fullmatch(preset)
    page = "/".join(match["model"].split("/")[:2]) if match else ""
    return License("terms on the model's page", f"https://www.kaggle.com/models/{page}")


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
_FOUR = {
    **{"image_size": None, "vision_encoder": None, "audio_encoder": None, "global_head_dim": 512},
    **{"global_rope_partial_rotary_factor": 0.25, "final_logit_soft_cap": 30, "sliding_window_size": 1024},
}
_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 128,
    "num_experts_per_token": 8,
    "expert_intermediate_dim": 704,
    "num_global_key_value_heads": 2,
}
_SMALL_FOUR = {
    **_FOUR,
    **{"sliding_window_size": 512, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144},
}
_E2B = {"sliding_window_pattern": 5, "num_kv_shared_layers": 20, "use_double_wide_mlp": True}
_PER_HEAD = {"query_head_dim_normalize": False}

GEMMAS: dict[str, dict[str, Any]] = {
    "gemma_2b_en": _gemma(2506172416, 256000, 18, 8, 1, 2048, 32768, 256),
    "gemma_7b_en": _gemma(8537680896, 256000, 28, 16, 16, 3072, 49152, 256),
    "gemma2_2b_en": _gemma(2614341888, 256000, 26, 8, 4, 2304, 18432, 256, **_TWO),
    "gemma2_9b_en": _gemma(9241705984, 256000, 42, 16, 8, 3584, 28672, 256, **_TWO),
    "gemma2_27b_en": _gemma(27227128320, 256000, 46, 32, 16, 4608, 73728, 128, **_TWO, **_PER_HEAD),
    # Trained on 1,024 tokens; keras-hub does not write down that it has neither soft caps nor windows, copies of
    # Google's config.json do. A preset that was fetched is planned by its own.
    "vault_gemma_1b_en": _gemma(1038741120, 256000, 26, 4, 4, 1152, 13824, 256),
    "gemma3_270m": _gemma(268098176, 262144, 18, 4, 1, 640, 2048, 256, **_SMALL),
    "gemma3_1b": _gemma(999885952, 262144, 26, 4, 1, 1152, 6912, 256, **_SMALL),
    "gemma3_4b_text": _gemma(3880099328, 262144, 34, 8, 4, 2560, 10240, 256, **_LARGE),
    "gemma3_12b_text": _gemma(11765788416, 262144, 48, 16, 8, 3840, 15360, 256, **_LARGE),
    "gemma3_27b_text": _gemma(27009002240, 262144, 62, 32, 16, 5376, 21504, 128, **_LARGE, **_PER_HEAD),
    "gemma4_26b_a4b": _gemma(25233141790, 262144, 30, 16, 8, 2816, 2112, 256, **_FOUR, **_EXPERTS),
    "gemma4_2b": _gemma(4628569379, 262144, 35, 8, 1, 1536, 6144, 256, **_SMALL_FOUR, **_E2B),
    "gemma4_4b": _gemma(7463013418, 262144, 42, 8, 2, 2560, 10240, 256, **_SMALL_FOUR, num_kv_shared_layers=18),
    "gemma4_31b": _gemma(30697345340, 262144, 60, 32, 16, 5376, 21504, 256, **_FOUR, num_global_key_value_heads=4),
}
"""By keras-hub's preset name: `params`, the parameter count that keras-hub's own registry states
(`GemmaBackbone.presets`, `Gemma3Backbone.presets`; of Gemma 4 that of keras-hub's text model, which has a frozen number
a block more than transformers counts), and the arguments of the backbone, as in the `config.json` of the
checkpoint. GemmaBackbone counts both gate matrices in `intermediate_dim`, Gemma3Backbone counts one."""


def architecture(preset: str, asked_by: str = "--preset") -> Architecture:
    """Return a public checkpoint's class and arguments.

    Args:
        preset: keras-hub's name, or a handle that ends in it; instruction-tuned and other tuned forms have the
            architecture of their base.
        asked_by: the option or setting that named it, for the message.

    Raises:
        ParamsError: no text Gemma of this name, with the nearest.
    """
    like = registered(preset, asked_by).like
    arguments = {key: value for key, value in GEMMAS[like].items() if key != "params"}
    return Architecture(BACKBONES.get(like[:6], "GemmaBackbone"), arguments)
