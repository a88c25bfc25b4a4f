"""LoRA kernels on keras-hub's layers: which layers get them, declared without values, and their first values.

On an `EinsumDense` kernel A has the kernel's shape with the last dimension replaced by the rank, and B is
(rank, last dimension): on Gemma's query one A a head and one B for all heads.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from stages.core.common.errors import StageError
from stages.core.records.layout import LoraConfig
from stages.core.sharding.keras_internals import declared_only, layers_within

# Every matrix of a block, in the model's order.
PROJECTIONS = (
    *("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"),
    *("per_layer_input_gate", "per_layer_up_proj"),
)

EXPERTS = ("moe_router", "moe_expert_bank")
"""Layers with matrices that get no adapter."""


def target_layers(backbone: keras.Model, targets: Sequence[str]) -> list[Any]:
    """Return the projections that match a target, in the model's order.

    Args:
        backbone: a GemmaBackbone or Gemma3Backbone.
        targets: each a regular expression that must match a layer's path (`decoder_block_0/attention/query`) whole, or
            the end of it that begins after a slash: so a layer's name is a target, and so is `attention/.*`.

    Raises:
        StageError: a target that is no regular expression, or matches nothing; the message names what there is.
    """
    layers = [layer for layer in layers_within(backbone) if layer.name in PROJECTIONS]
    paths = {layer.path: layer for layer in layers if layer.weights}
    chosen = set()
    for target in targets:
        try:
            pattern = re.compile(rf"(?:.*/)?(?:{target})")
        except re.error as error:
            raise StageError(
                f"A LoRA target must be a layer's name or a regular expression: {error}. Received: targets={target!r}."
            ) from error
        found = {path for path in paths if pattern.fullmatch(path)}
        if not found:
            if any(pattern.fullmatch(layer.path) for layer in layers_within(backbone) if layer.name in EXPERTS):
                raise StageError(
                    "LoRA on a router or its experts is not supported: there would be an adapter of each expert. "
                    f"Received: targets={target!r}. Choose of: {', '.join(PROJECTIONS)}."
                )
            blocks = len({path.split("/")[0] for path in paths})
            names = ", ".join(dict.fromkeys(path.split("/", 1)[1] for path in paths))
            raise StageError(
                f"A LoRA target must match a layer, and this one matches none. Received: targets={target!r}. "
                f"There are: {names}, each below decoder_block_0 to decoder_block_{blocks - 1}."
            )
        chosen |= found
    return [layer for path, layer in paths.items() if path in chosen]


def declare(backbone: keras.Model, lora: LoraConfig) -> None:
    """Freeze the backbone and declare LoRA kernels on its target layers; rank 0 leaves every weight trainable.

    The kernels have shapes and paths but no values, as the backbone's own weights after `build_backbone`.
    """
    backbone.trainable = True
    if lora.rank == 0:
        return
    chosen = target_layers(backbone, lora.targets)
    for layer in layers_within(backbone):
        layer.trainable = False
    with declared_only():
        for layer in chosen:
            layer.trainable = True
            layer.enable_lora(lora.rank, lora_alpha=lora.alpha)


def first_value(path: str, shape: tuple[int, ...], seed: int) -> Any:
    """Return the value a LoRA kernel starts from, as a NumPy float32 array.

    A is He-uniform and B zero, as in Keras' `enable_lora`, so that the tuned model starts as the base. Each A has its
    own stream, named by its path: adding a target changes no other layer's start.
    """
    if path.endswith("lora_kernel_b"):
        return np.zeros(shape, np.float32)
    # Keras' fan-in of a kernel with more than two dimensions: all but the last.
    limit = (6.0 / np.prod(shape[:-1])) ** 0.5
    stream = np.random.default_rng([seed, zlib.crc32(path.encode())])
    return stream.uniform(-limit, limit, shape).astype(np.float32)
