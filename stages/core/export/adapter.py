"""The LoRA adapter as PEFT's matrices, all of one rank.

Keras' LoRA on a kernel of several heads (heads, hidden, head size) has one A a head and one B for all. As a LoRA of the
matrix (heads x head size, hidden) that is of rank heads x r: the A's one below the other, and B's transpose once a head
along a diagonal. On the output projection (heads, head size, hidden) and the feed-forward layers the rank stays r.

Every module is padded with zeros to the largest rank, the scale alpha / r is multiplied into B, and `lora_alpha` is the
common rank: llama.cpp and vLLM take one rank and one alpha for all modules, and ignore PEFT's `rank_pattern` and
`alpha_pattern` without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stages.core.export.tensors import PREFIX
from stages.core.export.tuned import TrainedWeights, Tuned
from stages.core.presets.weight_table import StoredWeight, weight_table

A, B = "lora_kernel_a", "lora_kernel_b"


@dataclass(frozen=True)
class LoraModule:
    """A linear layer with an adapter.

    Attributes:
        name: Hugging Face's, such as `model.layers.0.self_attn.q_proj`.
        path: of the Keras layer, such as `decoder_block_0/attention/query`.
        weight: the kernel's row of the weight table.
        rank: of the adapter of the matrix, before padding.
    """

    name: str
    path: str
    weight: StoredWeight
    rank: int


def lora_modules(tuned: Tuned) -> list[LoraModule]:
    """Return the layers with an adapter, in the model's order; none where every weight was trained."""
    found = []
    for path, weight in weight_table(tuned.preset.architecture).items():
        layer = path.removesuffix("/kernel")
        if f"{layer}/{B}" in tuned.trained:
            times = weight.shape[0] if weight.kind == "heads_out" else 1
            name = PREFIX + weight.hugging_face.removesuffix(".weight")
            found.append(LoraModule(name, layer, weight, times * tuned.lora.rank))
    return found


def common_rank(modules: list[LoraModule]) -> int:
    """Return the rank that all modules are padded to, and `lora_alpha` with it."""
    return max(module.rank for module in modules)


def peft_shapes(modules: list[LoraModule]) -> dict[str, tuple[int, int]]:
    """Return the shape of each of PEFT's matrices by name, in the order in which `peft_tensors` yields them."""
    rank, shapes = common_rank(modules), {}
    for module in modules:
        outputs, inputs = module.weight.matrix_shape
        shapes[f"{module.name}.lora_A.weight"] = (rank, inputs)
        shapes[f"{module.name}.lora_B.weight"] = (outputs, rank)
    return shapes


def peft_tensors(tuned: Tuned, modules: list[LoraModule]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield PEFT's matrices with their names, float32: `lora_A` (rank, inputs) and `lora_B` (outputs, rank).

    The names are `<module>.lora_A.weight`, without what PEFT writes before them (`base_model.model.`). With the rank as
    `lora_alpha`, as they must be used, the update of a weight is `lora_B @ lora_A`.

    Args:
        tuned: a variant with an adapter.
        modules: from `lora_modules`.
    """
    rank = common_rank(modules)
    for module in modules:
        yield f"{module.name}.lora_A.weight", _matrix_a(tuned.trained, module, rank)
        yield f"{module.name}.lora_B.weight", _matrix_b(tuned.trained, module, rank, tuned.lora.scale)


def _matrix_a(trained: TrainedWeights, module: LoraModule, rank: int) -> np.ndarray:
    """Return `lora_A` (rank, inputs), rows of zeros at its end."""
    a = trained.array(f"{module.path}/{A}").astype(np.float32)
    if module.weight.kind == "heads_out":
        rows = a.transpose(0, 2, 1).reshape(-1, a.shape[1])
    else:
        rows = a.reshape(-1, a.shape[-1]).T
    result = np.zeros((rank, rows.shape[1]), np.float32)
    result[: len(rows)] = rows
    return result


def _matrix_b(trained: TrainedWeights, module: LoraModule, rank: int, scale: float) -> np.ndarray:
    """Return `lora_B` (outputs, rank) with the scale in it, columns of zeros at its end."""
    b = trained.array(f"{module.path}/{B}").astype(np.float32).T * np.float32(scale)
    outputs, r = b.shape
    heads = module.weight.shape[0] if module.weight.kind == "heads_out" else 1
    result = np.zeros((heads * outputs, rank), np.float32)
    for head in range(heads):
        result[head * outputs : (head + 1) * outputs, head * r : (head + 1) * r] = b
    return result
