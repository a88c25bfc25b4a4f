"""Runs a model of any size in float32 on one device, with the weights of one block in memory at a time.

Purpose: the proof of an export and the choice of codes need one pass over some text, not the model on a mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stages.core.load import lora_kernels
from stages.core.load.backbone import build_backbone
from stages.core.model import decoder
from stages.core.model.tensor_parallel import Projections
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import WeightSource
from stages.core.presets.weight_table import LAYER_TABLE
from stages.core.records.layout import LoraConfig
from stages.core.sharding import devices
from stages.core.sharding.keras_internals import set_value

TABLE = "token_embedding/embeddings"


def hidden_states(
    architecture: Architecture,
    weights: WeightSource,
    ids: np.ndarray,
    segment_ids: np.ndarray,
    *,
    lora: LoraConfig | None = None,
    projections: Projections = decoder.SINGLE,
    after_block: Callable[[Any], None] | None = None,
) -> jax.Array:
    """Return the final hidden states of sequences.

    Args:
        architecture: of the model.
        weights: its weights by keras-hub's paths.
        ids: int32 (batch, length), of tokens.
        segment_ids: int32 (batch, length), as `decoder.hidden_states` takes them.
        lora: of an adapter whose kernels are among the weights; None for none.
        projections: applies the linear layers.
        after_block: called with each block's layer after it has run, while it still has its weights.

    Returns:
        float32 (batch, length, hidden).
    """
    devices.configure("simulated", 1)
    backbone = build_backbone(architecture, "float32")
    if lora:
        lora_kernels.declare(backbone, lora)
    at_work: list[Any] = []

    def give(variable: Any) -> None:
        values = weights.read(variable.path, tuple(slice(0, size) for size in variable.shape))
        set_value(variable, jnp.asarray(values.astype(np.float32, copy=False)))

    def give_block(layer: Any) -> None:
        finish_block()
        at_work.append(layer)
        for variable in layer.weights:
            give(variable)

    def finish_block() -> None:
        for layer in at_work:
            if after_block:
                after_block(layer)
            for variable in layer.weights:
                # A placeholder.
                set_value(variable, jnp.zeros(()))
        at_work.clear()

    for variable in backbone.weights:
        if not variable.path.startswith("decoder_block_") and not variable.path.endswith("/embeddings"):
            give(variable)

    def embedded(path: str) -> jax.Array:
        columns = slice(0, weights.shape(path)[1])
        numbers, places = np.unique(ids, return_inverse=True)
        rows = [weights.read(path, (slice(number, number + 1), columns))[0] for number in numbers.tolist()]
        return jnp.asarray(np.stack(rows).astype(np.float32, copy=False)[places.reshape(ids.shape)])

    hidden = decoder.hidden_states(
        backbone,
        embedded(TABLE),
        jnp.asarray(segment_ids),
        projections=projections,
        layer_rows=embedded(LAYER_TABLE) if architecture.kinds[0].layer_input else None,
        before_block=give_block,
    )
    finish_block()
    return hidden
