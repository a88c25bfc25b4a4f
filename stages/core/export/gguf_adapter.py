"""A LoRA adapter as a GGUF file, which llama.cpp puts on a GGUF of its base: `llama-server --lora`.

Writes: one .gguf file. Source of names and keys: llama.cpp's `convert_lora_to_gguf.py` and `src/llama-adapter.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np

from stages.core.export.gguf import quiet_writer
from stages.core.export.gguf_metadata import architecture_name
from stages.core.export.tensors import PREFIX
from stages.core.files import atomic_path
from stages.core.presets.architecture import Architecture
from stages.core.presets.weight_table import weight_table

MATRICES = {"lora_A": "lora_a", "lora_B": "lora_b"}
"""PEFT's names and llama.cpp's."""


def write_gguf_adapter(
    target: Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, np.ndarray]],
    alpha: float,
    *,
    name: str,
) -> None:
    """Write an adapter, atomically; it is held in memory.

    Args:
        target: the .gguf file.
        architecture: of the base.
        tensors: by PEFT's names, `model.layers.0.self_attn.q_proj.lora_A.weight` (rank, inputs) and `...lora_B.weight`
            (outputs, rank). All must be of one rank: llama.cpp multiplies each product by `alpha` / its own rank, where
            PEFT would by alpha / the rank that `rank_pattern` has.
        alpha: PEFT's `lora_alpha`.
        name: shown by what reads the file.

    Raises:
        StageError: llama.cpp cannot express the base.
        ValueError: a tensor is of no layer of the model, of another shape or another rank.
    """
    table = weight_table(architecture).values()
    layers = {PREFIX + each.hugging_face.removesuffix(".weight"): each for each in table}
    with atomic_path(target) as temporary:
        writer = quiet_writer(temporary, architecture_name(architecture))
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        ranks = set()
        for tensor, values in tensors:
            layer, matrix, _ = tensor.rsplit(".", 2)
            weight = layers[layer]
            outputs, inputs = weight.matrix_shape
            rank, other = values.shape if matrix == "lora_A" else values.shape[::-1]
            if other != (inputs if matrix == "lora_A" else outputs):
                raise ValueError(
                    f"expected {matrix} of a layer {weight.matrix_shape}. Received: {tensor} {values.shape}"
                )
            ranks.add(rank)
            writer.add_tensor(f"{weight.gguf}.{MATRICES[matrix]}", np.ascontiguousarray(values, np.float32))
        if len(ranks) != 1:
            raise ValueError(f"expected matrices of one rank. Received: ranks={sorted(ranks)}")
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
