"""The metadata that a GGUF file of a Gemma 4 has: two kinds of blocks, shared keys and values, experts.

Source of the keys and of what a missing one means: llama.cpp's `conversion/gemma.py`, and `gemma4.cpp` in its
`src/models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from stages.core.common.errors import StageError
from stages.core.presets.architecture import Architecture
from stages.core.presets.gguf_file import field_of, need
from stages.core.presets.layer_kinds import LayerKind, first_sharing
from stages.core.presets.untrusted import brief

FACTORS = "rope_freqs.weight"
"""Divides the rotary angle of each pair of a head, in blocks with full attention."""

UNTURNED = 1e30
"""The factor of a pair that is not turned."""


def rope_factors(full: LayerKind) -> np.ndarray:
    """Return the values of `FACTORS`, float32 (head size / 2,)."""
    pairs = np.arange(full.head // 2)
    return np.where(pairs < full.turned, 1.0, UNTURNED).astype(np.float32)


def check_sharing(architecture: Architecture, what: str) -> None:
    """Check that blocks share keys and values as llama.cpp has them do: of the last two with their own.

    Args:
        architecture: of a Gemma 4.
        what: shares them, for the message.

    Raises:
        StageError: others are shared; the file would be of another model.
    """
    first = first_sharing(architecture)
    for number, kind in enumerate(architecture.kinds[first:], first):
        if kind.keys_of != first - (1 if kind.window is None else 2):
            raise StageError(
                "Blocks that share keys and values must have those of the last two blocks with their own, of which the "
                f"first has a window. Received: block {number} with those of block {kind.keys_of}, in {what}"
            )


def arguments(reader: gguf.GGUFReader, path: Path) -> dict[str, Any]:
    """Return the arguments of keras-hub's Gemma4Backbone that are not those of every Gemma.

    Args:
        reader: of the open file.
        path: of the file, for messages.

    Raises:
        StageError: the file lacks a hyper-parameter, or has one that keras-hub cannot express.
    """

    def stated(key: str) -> Any:
        return need(reader, f"gemma4.{key}", path)

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    windowed = stated("attention.sliding_window_pattern")
    count = len(windowed) if isinstance(windowed, list) and {*windowed} <= {True, False} else 0
    if not count or count != stated("block_count"):
        raise StageError(
            "The GGUF file must state attention.sliding_window_pattern, true or false, for each block. "
            f"Received: {brief(windowed)} in {path}"
        )
    layer_inputs = field_of(reader, "gemma4.embedding_length_per_layer_input", 0)
    head, widths = stated("attention.key_length"), _of_blocks(stated("feed_forward_length"), count)
    keys = dict(zip(windowed, _of_blocks(stated("attention.head_count_kv"), count), strict=True))
    full = windowed.index(False) if False in windowed else None
    alike = full is not None and f"blk.{full}.attn_v.weight" not in tensors
    return {
        "num_key_value_heads": keys.get(True, keys.get(False)),
        "intermediate_dim": widths[0],
        "head_dim": stated("attention.key_length_swa"),
        "global_head_dim": head,
        "num_global_key_value_heads": keys[False] if alike else None,
        "image_size": None,
        "final_logit_soft_cap": field_of(reader, "gemma4.final_logit_softcapping", 30.0),
        "use_sliding_window_attention": True,
        "sliding_window_size": stated("attention.sliding_window"),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in windowed],
        "local_rope_wavelength": stated("rope.freq_base_swa"),
        "global_rope_wavelength": stated("rope.freq_base"),
        "global_rope_partial_rotary_factor": 1.0 if full is None else _turned_part(tensors.get(FACTORS), head, path),
        "num_kv_shared_layers": field_of(reader, "gemma4.attention.shared_kv_layers", 0),
        "use_double_wide_mlp": widths[-1] != widths[0],
        "hidden_size_per_layer_input": layer_inputs,
        **_experts(reader, path),
        "vision_encoder": None,
        "audio_encoder": None,
    }


def _of_blocks(value: Any, count: int) -> list[Any]:
    """Return a number of each block, of which the file states one for all or a list."""
    return value if isinstance(value, list) and len(value) == count else [value] * count


def _experts(reader: gguf.GGUFReader, path: Path) -> dict[str, Any]:
    """Return the arguments of a model with experts."""
    if not field_of(reader, "gemma4.expert_count", 0):
        return {"enable_moe_block": False}
    width = need(reader, "gemma4.expert_feed_forward_length", path)
    return {
        "enable_moe_block": True,
        "num_experts": need(reader, "gemma4.expert_count", path),
        "num_experts_per_token": need(reader, "gemma4.expert_used_count", path),
        "expert_intermediate_dim": width[0] if isinstance(width, list) and width else width,
    }


def _turned_part(tensor: gguf.ReaderTensor | None, head: Any, path: Path) -> float:
    """Return which part of a head full attention turns."""
    factors = np.zeros(0) if tensor is None else np.asarray(tensor.data).ravel()
    turned = int(np.count_nonzero(factors == 1.0))
    untouched = factors[turned:] > UNTURNED / 10
    if not turned or 2 * len(factors) != head or (factors[:turned] != 1.0).any() or not untouched.all():
        raise StageError(
            f"{FACTORS} must be 1 for the pairs of a head that are turned and {UNTURNED:g} for all others. "
            f"Received: {brief(factors[:8].tolist())} in {path}"
        )
    return 2 * turned / head
