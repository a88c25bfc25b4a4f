"""A GGUF file's metadata as the class and arguments of a keras-hub backbone.

Reads: the one .gguf file of a folder. Source of the keys and of what a missing one means: llama.cpp's
`conversion/gemma.py`, and `gemma.cpp`, `gemma2.cpp` and `gemma3.cpp` in its `src/models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from stages.core.common.errors import StageError
from stages.core.presets import gguf_gemma4
from stages.core.presets.architecture import FAMILIES, Architecture
from stages.core.presets.gguf_file import field_of, need, only_file, open_file
from stages.core.presets.untrusted import brief

GLOBAL_ROPE_WAVELENGTH = 1.0e6
"""keras-hub's Gemma3Backbone has it as a constant for its global layers (and 1.0e4 for the local ones)."""

TABLE = "token_embd.weight"
CLASSES = {"gemma3": "Gemma3Backbone", "gemma4": "Gemma4Backbone"}
BLOCKS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""By its number of blocks llama.cpp recognizes the 27B of a family, which scales queries by hidden size / heads; no key
of the file says so. All others scale them by the size of a head."""


def read_architecture(folder: Path) -> Architecture:
    """Return the architecture of the .gguf file of a folder.

    Raises:
        StageError: there is not one such file, it is not the GGUF of a Gemma, lacks a hyper-parameter, or has one that
            keras-hub cannot express.
    """
    path = only_file(folder)
    return architecture_of(open_file(path), path)


def architecture_of(reader: gguf.GGUFReader, path: Path) -> Architecture:
    """Return the architecture of an open file (`path` for messages), as `read_architecture` does."""
    kind = field_of(reader, "general.architecture")

    def stated(key: str) -> Any:
        return need(reader, f"{kind}.{key}", path)

    for suffix in ("", *(["_swa"] if kind == "gemma4" else [])):
        if stated(f"attention.key_length{suffix}") != stated(f"attention.value_length{suffix}"):
            raise StageError(f"Keys and values must have the same head size. Received: path={path}")
    names = {tensor.name: tensor for tensor in reader.tensors}
    if TABLE not in names or len(names[TABLE].shape) != 2:
        raise StageError(f"The GGUF file must hold {TABLE}, and does not. Received: path={path}")
    epsilon = stated("attention.layer_norm_rms_epsilon")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise StageError(f"The GGUF file must state a small epsilon. Received: {brief(epsilon)} in {path}")
    class_name = CLASSES.get(kind, "GemmaBackbone")
    config = {
        # Of the tensor, not of the token list: some files pad one and not the other.
        "vocabulary_size": int(names[TABLE].shape[1]),
        "num_layers": stated("block_count"),
        "num_query_heads": stated("attention.head_count"),
        "num_key_value_heads": stated("attention.head_count_kv"),
        "hidden_dim": stated("embedding_length"),
        "intermediate_dim": stated("feed_forward_length"),
        "head_dim": stated("attention.key_length"),
        "query_head_dim_normalize": stated("block_count") != BLOCKS_OF_27B.get(kind),
        # Stored as float32: 9.999999974752427e-07 was written as 1e-06.
        "layer_norm_epsilon": float(str(np.float32(epsilon))),
        "dropout": 0,
    }
    if kind == "gemma4":
        config |= gguf_gemma4.arguments(reader, path)
    for key in ("num_layers", "num_query_heads", "num_key_value_heads", "hidden_dim", "intermediate_dim", "head_dim"):
        value = config[key]
        # Every block has tensors, so there are fewer blocks.
        if not isinstance(value, int) or not 1 <= value <= (len(names) if key == "num_layers" else 1 << 22):
            raise StageError(f"The GGUF file must state sizes of a Gemma. Received: {key}={brief(value)} in {path}")
    config["intermediate_dim"] *= FAMILIES[class_name].gates
    if kind == "gemma2":
        config |= _of_gemma2(reader)
    if kind == "gemma3":
        config |= _of_gemma3(reader, set(names), path)
    architecture = Architecture(class_name, config)
    if kind == "gemma4":
        gguf_gemma4.check_sharing(architecture, str(path))
    return architecture


def _of_gemma2(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Return what sets a Gemma 2 apart from a Gemma."""
    return {
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "attention_logit_soft_cap": field_of(reader, "gemma2.attn_logit_softcapping", 50.0),
        "final_logit_soft_cap": field_of(reader, "gemma2.final_logit_softcapping", 30.0),
        "use_sliding_window_attention": True,
        "sliding_window_size": field_of(reader, "gemma2.attention.sliding_window", 4096),
    }


def _of_gemma3(reader: gguf.GGUFReader, names: set[str], path: Path) -> dict[str, Any]:
    """Return the arguments that only a Gemma3Backbone takes, and those that follow from the names of the tensors."""
    wavelength = need(reader, "gemma3.rope.freq_base", path)
    if wavelength != GLOBAL_ROPE_WAVELENGTH:
        raise StageError(
            f"keras-hub's Gemma 3 has a fixed global RoPE wavelength of {GLOBAL_ROPE_WAVELENGTH:g}. "
            f"Received: gemma3.rope.freq_base={brief(wavelength)} in {path}"
        )
    return {
        "image_size": 896,
        "use_query_key_norm": "blk.0.attn_q_norm.weight" in names,
        "use_post_ffw_norm": "blk.0.post_ffw_norm.weight" in names,
        "use_post_attention_norm": "blk.0.post_attention_norm.weight" in names,
        "attention_logit_soft_cap": field_of(reader, "gemma3.attn_logit_softcapping"),
        "final_logit_soft_cap": field_of(reader, "gemma3.final_logit_softcapping"),
        "use_sliding_window_attention": True,
        "sliding_window_size": need(reader, "gemma3.attention.sliding_window", path),
        "local_rope_scaling_factor": 1.0,
        "global_rope_scaling_factor": field_of(reader, "gemma3.rope.scaling.factor", 1.0),
        "vision_encoder": None,
    }
