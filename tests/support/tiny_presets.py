"""Tiny random Gemma presets and made-up reviews, so that tests run the real code in seconds.

Purpose: a preset folder as keras-hub's own `save_to_preset` writes it, with every feature of its family switched on
and every weight away from its initial value, so that a wrong transpose, norm or mask changes the numbers.
Nothing heavy is imported at the top: a test that needs only `tiny_reviews` stays fast.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

VOCABULARY_SIZE = 512
"""Byte fallback alone takes 256 pieces, so this is about the smallest vocabulary with some words in it."""

_COMMON = {
    "vocabulary_size": VOCABULARY_SIZE,
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 64,
    "intermediate_dim": 128,
    "head_dim": 16,
}
_POST_NORMS = {"use_post_ffw_norm": True, "use_post_attention_norm": True}
_SLIDING = {"use_sliding_window_attention": True, "sliding_window_size": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {**_COMMON, "num_key_value_heads": 4},
    "gemma2": {
        **_COMMON,
        **_POST_NORMS,
        **_SLIDING,
        "num_key_value_heads": 2,
        "final_logit_soft_cap": 30,
        "attention_logit_soft_cap": 50,
    },
    "gemma3": {
        **_COMMON,
        **_POST_NORMS,
        **_SLIDING,
        "num_key_value_heads": 1,
        "image_size": 896,
        "vision_encoder": None,
        "use_query_key_norm": True,
    },
    "gemma4": {
        **_COMMON,
        "num_key_value_heads": 2,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "global_rope_partial_rotary_factor": 0.25,
        "final_logit_soft_cap": 30,
        "sliding_window_size": 8,
        "sliding_window_pattern": 2,
        "image_size": None,
        "vision_encoder": None,
        "audio_encoder": None,
    },
}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_dim": 24}
"""Arguments that give a Gemma 4 experts beside the dense feed-forward."""
"""Backbone arguments of each family. Of every six layers Gemma 3 makes five local: `num_layers=6` adds a global one."""

_SHARING = {
    **{"num_query_heads": 8, "num_global_key_value_heads": None, "vocab_size_per_layer_input": VOCABULARY_SIZE},
    "num_kv_shared_layers": 2,
}
EDGE: dict[str, dict[str, Any]] = {
    "E2B": {
        **_SHARING,
        **{"num_layers": 4, "use_double_wide_mlp": True, "num_key_value_heads": 1, "hidden_size_per_layer_input": 8},
    },
    # The last of two blocks with windows is the one whose keys are shared.
    "E4B": {
        **_SHARING,
        **{"num_layers": 5, "num_key_value_heads": 2, "hidden_size_per_layer_input": 16},
        "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention", "full_attention"],
    },
}
"""Arguments by which a "gemma4" is of the kind of E2B or E4B: blocks share keys and values, and add numbers of each
token's own."""

BACKBONES = {"gemma3": "Gemma3Backbone", "gemma4": "Gemma4Backbone"}
"""Classes of keras-hub; of the other families GemmaBackbone."""

_OPENINGS = [
    "This was an absolutely terrible movie.",
    "I went to see this film because my sister liked the book.",
    "Best comedy movies in the 90s had better jokes than this one.",
    "A quiet, beautiful picture about two brothers and their boat.",
]
_MIDDLES = [
    "The acting was wooden and the story made no sense at all.",
    "Every scene is lit like a painting, and the music never gets in the way.",
    "I have been known to fall asleep during films, but this one kept me awake until 2 in the morning.",
    "The director clearly loves his characters; the camera stays with them.",
    "Nobody in the cinema laughed, not even once.",
    "It's worth seeing for the last twenty minutes alone.",
]
_ENDINGS = [
    "Avoid it.",
    "See it twice!",
    "4 out of 10.",
    "A great parting role in a film I recommend to everyone.",
]


def tiny_reviews(count: int) -> list[str]:
    """Return `count` made-up reviews: from 5 to some 100 words, some with line breaks, the same ones every time."""
    reviews = []
    for number in range(count):
        middles = [_MIDDLES[(number * 5 + step * 7) % len(_MIDDLES)] for step in range(number * 3 % 8)]
        sentences = [_OPENINGS[number % len(_OPENINGS)], *middles, _ENDINGS[number // 2 % len(_ENDINGS)]]
        reviews.append(("\n\n" if number % 3 == 1 else " ").join(sentences))
    return reviews


TURNS = ("<start_of_turn>", "<end_of_turn>")
"""The control pieces of Gemma's chat template."""

TURNS_OF_GEMMA4 = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool_response>")
"""And of Gemma 4's."""


def tiny_proto(turns: tuple[str, ...] = TURNS, *, control: bool = False) -> bytes:
    """Return a SentencePiece proto like Gemma's: BPE, byte fallback, no normalizing, line breaks as own pieces.

    Args:
        turns: the pieces of the chat template that it has.
        control: they are control pieces, as a GGUF file has them, which SentencePiece finds in no text; else pieces as
            the line breaks are, as in Gemma's own vocabulary.
    """
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_OPENINGS + _MIDDLES + _ENDINGS),
        model_writer=writer,
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=[*(() if control else turns), "\n", "\n\n", "▁▁"],
        control_symbols=[*(turns if control else ())],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )
    return writer.getvalue()


def tiny_backbone(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Return a float32 keras-hub backbone of a family ("gemma", "gemma2", "gemma3", "gemma4") with random weights.

    `overrides` replace arguments of the backbone, such as `num_key_value_heads=1`.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras_hub

    backbone_class = getattr(keras_hub.models, BACKBONES.get(family, "GemmaBackbone"))
    backbone = backbone_class(**{**CONFIGS[family], "dtype": "float32", **overrides})
    random = np.random.default_rng(seed)
    for weight in backbone.weights:
        layer, name = weight.path.split("/")[-2:]
        values = random.standard_normal(weight.shape).astype("float32")
        # Sizes such that soft caps and softmaxes are well off their linear range, and that the blocks outweigh the
        # embedding in the residual stream: else a tied head only repeats the last token.
        if name in ("embeddings", "scale", "layer_scalar", "per_dim_scale", "per_expert_scale"):
            values *= 0.3
            values += 2.0 if layer.startswith("post_") else 0.0
            if family == "gemma4" and name != "embeddings":
                # Its norms multiply by the scale alone. Queries and keys are not divided by the root of the head size:
                # larger ones would make the softmax so steep that the last bit of a weight changes the output.
                values += 1.0 if layer != "query_norm" else 0.0
        else:
            fan_in = values.shape[0] * values.shape[1] if layer == "attention_output" else values.shape[-2]
            values *= {"query": 2.0, "key": 2.0, "attention_output": 4.0, "ffw_linear": 4.0}.get(layer, 1.0)
            # A router divides by the root of the hidden size itself: its choices are to be clear ones.
            values /= 0.5 if layer == "proj" else fan_in**0.5
        weight.assign(values)
    return backbone


def write_tiny_preset(folder: Path, family: str, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a keras-hub preset folder of a tiny random model and return it.

    The files: config.json, metadata.json, model.weights.h5, tokenizer.json, preprocessor.json (without it keras-hub
    takes Gemma 3 for a vision model), assets/tokenizer/vocabulary.spm.

    Args:
        folder: where to; made if it is not there.
        family: "gemma", "gemma2", "gemma3" or "gemma4".
        seed: of the weights.
        overrides: arguments of the backbone instead of those in `CONFIGS`.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras_hub

    folder.mkdir(parents=True, exist_ok=True)
    tiny_backbone(family, seed=seed, **overrides).save_to_preset(str(folder))
    if family == "gemma4":
        towers = dict.fromkeys(("has_vision_tokens", "has_audio_tokens", "has_video_tokens"), False)
        tokenizer = keras_hub.models.Gemma4Tokenizer(tiny_proto(TURNS_OF_GEMMA4), **towers)
        preprocessor = keras_hub.models.Gemma4CausalLMPreprocessor(tokenizer)
    elif family == "gemma3":
        tokenizer = keras_hub.models.Gemma3Tokenizer(tiny_proto(), has_vision_tokens=False)
        preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(tokenizer)
    else:
        preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(keras_hub.models.GemmaTokenizer(tiny_proto()))
    preprocessor.save_to_preset(str(folder))
    return folder
