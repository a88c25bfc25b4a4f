"""A LoRA adapter in PEFT's form on the weights of the base.

A LoRA of PEFT's on several heads is, in general, no LoRA of Keras', which has one B for all heads. So an adapter is
used in two ways: added to the weights it belongs to while they are read (`AdaptedSource`), which is exact whatever it
looks like, or as Keras' kernels (`keras_kernels`), to train on, where it is of their form.
"""

from __future__ import annotations

import numpy as np

from stages.core.adapters.peft import Lora, PeftAdapter
from stages.core.common.errors import StageError
from stages.core.presets.formats import WeightSource


class AdaptedSource:
    """A base's weights with an adapter added while they are read: W + scale B A, of the slice that is asked for."""

    def __init__(self, base: WeightSource, adapter: PeftAdapter) -> None:
        """Take both; nothing is read yet."""
        self._base, self._layers = base, adapter.layers

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the whole weight."""
        return self._base.shape(path)

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight; float32 where it has an adapter."""
        base = self._base.read(path, index)
        if path not in self._layers:
            return base
        return base.astype(np.float32) + product(self._layers[path], index)


def product(lora: Lora, index: tuple[slice, ...]) -> np.ndarray:
    """Return a slice of scale B A in the kernel's Keras shape, float32."""
    scaled, a, shape = lora.b * np.float32(lora.scale), lora.a, lora.weight.shape
    if lora.weight.kind == "heads_out":
        rows = scaled.reshape(shape[0], shape[2], -1)[index[0], index[2]]
        return np.matmul(rows, a[:, index[1]]).transpose(0, 2, 1)
    if lora.weight.kind == "heads_in":
        columns = a.reshape(-1, shape[0], shape[1])[:, index[0], index[1]]
        return np.tensordot(columns, scaled[index[2]], axes=(0, 1))
    return (scaled[index[1]] @ a[:, index[0]]).T


def keras_kernels(adapter: PeftAdapter, rank: int, scale: float) -> dict[str, np.ndarray]:
    """Return the adapter as Keras' LoRA kernels of a rank, by their paths.

    On a kernel (heads, inputs, head size) Keras has one A a head and one B for all: as one matrix that is a LoRA of
    rank heads x `rank`, whose B has the same block once a head along its diagonal and zeros elsewhere. Columns of zeros
    beyond, with which all layers are brought to one rank, are left out.

    Args:
        adapter: from `read_peft`.
        rank: of the kernels.
        scale: alpha / rank of the kernels; B is divided by it, so that the model is the same.

    Raises:
        StageError: a layer's matrices are not of this form, or of a larger rank.
    """
    kernels = {}
    for path, lora in adapter.layers.items():
        heads = lora.weight.shape[0] if lora.weight.kind == "heads_out" else 1
        b = _one_block(lora, heads, rank)
        a = np.zeros((heads * rank, lora.a.shape[1]), np.float32)
        kept = lora.a[: heads * rank]
        a[: len(kept)] = kept
        layer = path.removesuffix("kernel")
        if lora.weight.kind == "heads_out":
            kernels[f"{layer}lora_kernel_a"] = np.ascontiguousarray(a.reshape(heads, rank, -1).transpose(0, 2, 1))
        else:
            kernels[f"{layer}lora_kernel_a"] = np.ascontiguousarray(a.T).reshape(*lora.weight.shape[:-1], rank)
        kernels[f"{layer}lora_kernel_b"] = np.ascontiguousarray(b.T * np.float32(lora.scale / scale))
    return kernels


def _one_block(lora: Lora, heads: int, rank: int) -> np.ndarray:
    """Return the block (outputs / heads, rank) that is repeated for each head on the diagonal of B.

    Raises:
        StageError: B is not of this form.
    """
    outputs = lora.b.shape[0] // heads
    wide = np.zeros((lora.b.shape[0], max(heads * rank, lora.b.shape[1])), np.float32)
    wide[:, : lora.b.shape[1]] = lora.b
    block = wide[:outputs, :rank].copy()
    for head in range(heads):
        place = wide[head * outputs : (head + 1) * outputs, head * rank : (head + 1) * rank]
        same = np.array_equal(place, block)
        place[...] = 0
        if not same:
            break
    if not same or wide.any():
        form = f"{heads} equal blocks of rank {rank} on the diagonal of lora_B" if heads > 1 else f"rank {rank}"
        raise StageError(
            f"An adapter to train on must have Keras' form: {form} of {lora.name}. Received: rank {lora.b.shape[1]}, "
            "of another form\nSet finetune.rank to the adapter's. Those of other programs seldom have this form where "
            "a layer has several heads: train on such an adapter there."
        )
    return block
