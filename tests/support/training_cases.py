"""The runs that tests/data/record_training.py does by hand and tests/finetune/test_reference.py repeats with this
project.

Purpose: configurations, first weights, sequences and settings, made from seeds by plain NumPy, so that both sides start
from the same numbers and share no code that computes. Names and shapes of weights are those of Hugging Face's
checkpoints; LoRA's A and B have the names and shapes that `stages/core/model/lora.py` describes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RECORDED = Path(__file__).parents[1] / "data" / "reference_training.npz"

VOCABULARY, HIDDEN, INTERMEDIATE, HEADS, HEAD = 64, 20, 24, 4, 8
SEQUENCES, HELD_OUT, LENGTH = 14, 5, 16
PAD, BOS, FIRST_WORD = 0, 2, 4

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "head_dim": HEAD,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {
        **_COMMON,
        "model_type": "gemma",
        "hidden_act": "gelu_pytorch_tanh",
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "rope_parameters": _PLAIN_ROPE,
    },
    # Queries scaled as in the 27B: by the hidden dimension over the heads.
    "gemma2": {
        **_COMMON,
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": HIDDEN // HEADS,
        "sliding_window": 6,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
        "rope_parameters": _PLAIN_ROPE,
    },
    # The sixth block is the first that sees beyond the sliding window.
    "gemma3": {
        **_COMMON,
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": HEAD,
        "sliding_window": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": _PLAIN_ROPE,
        },
    },
}
"""The `config.json` of each family, as transformers 5 writes it."""

PROJECTIONS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/attention_output": "self_attn.o_proj",
    "ffw_gating": "mlp.gate_proj",
    "ffw_gating_2": "mlp.up_proj",
    "ffw_linear": "mlp.down_proj",
}
"""keras-hub's path of each projection within a block, and Hugging Face's."""


@dataclass(frozen=True)
class Case:
    """A run: `settings` are keys of params.yaml's `finetune`; sequences are packed, or one per row and padded.

    The mesh changes nothing of what is recorded: it is the one on which the test repeats the run.
    """

    family: str
    packed: bool
    mesh: tuple[int, int]
    settings: dict[str, Any]


_ALWAYS = {
    "lora_dropout": 0.0,
    "batch_size": 3,
    "learning_rate": 0.01,
    "beta_1": 0.9,
    "beta_2": 0.99,
    # Large enough that where it is added matters, and that a gradient which rounding makes is no whole step.
    "epsilon": 1e-3,
    "weight_decay": 0.2,
    "validate_every": None,
    "validate_sequences": None,
    "early_stopping": None,
}
# 14 sequences in batches of 3: five batches, the last of 2. Accumulated by 2: three steps, the last of the one batch;
# by 3: two steps, the last of two batches; by 4: two steps, the last of the one batch.
_FULL = {**_ALWAYS, "rank": 0, "alpha": None, "targets": ["query"]}
_LORA = {**_ALWAYS, "rank": 2, "alpha": 3.0, "weight_decay": 0.5}
CASES = {
    "gemma, full, packed": Case(
        "gemma",
        True,
        (2, 4),
        {
            **_FULL,
            "gradient_accumulation": 2,
            "epochs": 3,
            "steps": 7,
            "schedule": "linear",
            "warmup_steps": 2,
            "clip_norm": 0.7,
            "rematerialize": False,
            "seed": 1,
        },
    ),
    "gemma, LoRA, cut": Case(
        "gemma",
        False,
        (1, 1),
        {
            **_LORA,
            "targets": ["query", "key", "value", "attention_output"],
            "gradient_accumulation": 3,
            "epochs": 3,
            "steps": None,
            "schedule": "constant",
            "warmup_steps": 0,
            "clip_norm": None,
            "rematerialize": False,
            "seed": 2,
        },
    ),
    "gemma2, full, cut": Case(
        "gemma2",
        False,
        (1, 1),
        {
            **_FULL,
            "gradient_accumulation": 4,
            "epochs": 3,
            "steps": None,
            "schedule": "constant",
            "warmup_steps": 0,
            "clip_norm": None,
            "rematerialize": True,
            "seed": 3,
        },
    ),
    "gemma2, LoRA, packed": Case(
        "gemma2",
        True,
        (2, 4),
        {
            **_LORA,
            "targets": [path.split("/")[-1] for path in PROJECTIONS],
            "gradient_accumulation": 2,
            "epochs": 2,
            "steps": None,
            "schedule": "cosine",
            "warmup_steps": 2,
            "clip_norm": 0.3,
            "rematerialize": False,
            "seed": 4,
        },
    ),
    "gemma3, full, cut": Case(
        "gemma3",
        False,
        (2, 4),
        {
            **_FULL,
            "gradient_accumulation": 3,
            "epochs": 3,
            "steps": None,
            "schedule": "cosine",
            "warmup_steps": 0,
            "clip_norm": 0.7,
            "rematerialize": False,
            "seed": 5,
        },
    ),
    "gemma3, LoRA, packed": Case(
        "gemma3",
        True,
        (1, 1),
        {
            **_LORA,
            "targets": ["query", "value"],
            "gradient_accumulation": 1,
            "epochs": 2,
            "steps": 7,
            "schedule": "linear",
            "warmup_steps": 0,
            "clip_norm": None,
            "rematerialize": True,
            "seed": 6,
        },
    ),
}
"""Every pair of family, form of the sequences, full or LoRA, and mesh is in one of them: six runs instead of 24."""


def first_weights(family: str) -> dict[str, np.ndarray]:
    """The weights that a family's runs start from, by Hugging Face's names, float32."""
    config = CONFIGS[family]
    across, shared = HEADS * HEAD, config["num_key_value_heads"] * HEAD
    linear = {
        "self_attn.q_proj": (across, HIDDEN),
        "self_attn.k_proj": (shared, HIDDEN),
        "self_attn.v_proj": (shared, HIDDEN),
        "self_attn.o_proj": (HIDDEN, across),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    if family != "gemma":
        norms |= {"pre_feedforward_layernorm": HIDDEN, "post_feedforward_layernorm": HIDDEN}
    if family == "gemma3":
        norms |= {"self_attn.q_norm": HEAD, "self_attn.k_norm": HEAD}
    weights = {}
    for block in range(config["num_hidden_layers"]):
        for name, shape in linear.items():
            weights[f"model.layers.{block}.{name}.weight"] = _normal(name, block, shape) / np.sqrt(shape[1])
        for name, size in norms.items():
            weights[f"model.layers.{block}.{name}.weight"] = 0.3 * _normal(name, block, (size,))
    weights["model.norm.weight"] = 0.3 * _normal("norm", 0, (HIDDEN,))
    weights["model.embed_tokens.weight"] = 0.3 * _normal("embed_tokens", 0, (VOCABULARY, HIDDEN))
    return {name: value.astype(np.float32) for name, value in weights.items()}


def first_adapter(case: Case) -> dict[str, np.ndarray]:
    """The A and B that a LoRA run starts from, by keras-hub's paths, float32; B is not zero, so that A is trained."""
    rank, shared = case.settings["rank"], CONFIGS[case.family]["num_key_value_heads"]
    kernels = {
        "attention/query": (HEADS, HIDDEN, HEAD),
        "attention/key": (shared, HIDDEN, HEAD),
        "attention/value": (shared, HIDDEN, HEAD),
        "attention/attention_output": (HEADS, HEAD, HIDDEN),
        "ffw_gating": (HIDDEN, INTERMEDIATE),
        "ffw_gating_2": (HIDDEN, INTERMEDIATE),
        "ffw_linear": (INTERMEDIATE, HIDDEN),
    }
    arrays = {}
    for block in range(CONFIGS[case.family]["num_hidden_layers"]):
        for path, shape in kernels.items():
            if rank and path.split("/")[-1] in case.settings["targets"]:
                a, b = f"{path}/lora_kernel_a", f"{path}/lora_kernel_b"
                arrays[f"decoder_block_{block}/{a}"] = 0.2 * _normal(a, block, (*shape[:-1], rank))
                arrays[f"decoder_block_{block}/{b}"] = 0.2 * _normal(b, block, (rank, shape[-1]))
    return {path: value.astype(np.float32) for path, value in arrays.items()}


def sequences(case: Case) -> dict[str, dict[str, np.ndarray]]:
    """Training and validation sequences as `tokenize` writes them: (sequences, LENGTH), very unequal in targets."""
    return {
        split: _sequences(count, case.packed, np.random.default_rng([case.settings["seed"], number]))
        for number, (split, count) in enumerate({"train": SEQUENCES, "validation": HELD_OUT}.items())
    }


def _sequences(count: int, packed: bool, random: np.random.Generator) -> dict[str, np.ndarray]:
    names = ("token_ids", "target_ids", "segment_ids")
    arrays = {name: np.zeros((count, LENGTH), np.int32) for name in names}
    weights = np.zeros((count, LENGTH), np.float32)
    for row in range(count):
        # Packed, a row holds several pieces and may have room left at its end.
        place, segment = 0, 0
        while place < LENGTH and (segment == 0 or (packed and random.random() < 0.9)):
            size = min(int(random.integers(2, LENGTH // 2 if packed else LENGTH + 1)), LENGTH - place)
            text = random.integers(FIRST_WORD, VOCABULARY, size)
            piece, segment = slice(place, place + size), segment + 1
            arrays["token_ids"][row, piece] = [BOS, *text[:-1]]
            arrays["target_ids"][row, piece] = text
            arrays["segment_ids"][row, piece] = segment
            weights[row, piece] = 1
            # The beginning of some is a prompt, which is not trained on.
            weights[row, place : place + int(random.integers(0, size + 1))] = random.integers(0, 2)
            place += size
    if not packed:
        del arrays["segment_ids"]
    return {**arrays, "weights": weights}


def _normal(name: str, block: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([zlib.crc32(name.encode()), block]).standard_normal(shape)
