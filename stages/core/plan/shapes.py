"""Shapes first: what a model, its adapter and its optimizer take on a mesh, from the architecture alone.

Purpose: `load --dry-run` and `plan`. No weight is read or allocated and no device mesh is built, so a 27B on 32 devices
resolves on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stages.core.load import lora_kernels, weight_loading
from stages.core.load.backbone import build_backbone
from stages.core.presets.architecture import Architecture
from stages.core.records.layout import LoraConfig, MeshShape, NamedLayout
from stages.core.sharding.layout import Placement, Weight, lay_out, lay_out_slot

# AdamW's slots for each trainable weight (https://arxiv.org/abs/1711.05101), by Keras' names.
SLOTS = ("momentum", "velocity")


def resolve_shapes(
    architecture: Architecture,
    mesh: MeshShape,
    layout: NamedLayout,
    dtype: str,
    lora: LoraConfig | None = None,
) -> list[Placement]:
    """Place every weight, LoRA kernel and optimizer slot of a model that does not exist.

    Keras-hub declares the weights, so `devices.configure` must have been called before; how many devices it was called
    for does not matter.

    Args:
        architecture: class and arguments.
        mesh: axis names and sizes.
        layout: from `make_layout`.
        dtype: a Keras dtype policy name.
        lora: what is trained; None for the weights alone.

    Returns:
        The model's weights in its order, LoRA kernels among them; then momentum and velocity of each trainable weight,
        typed as the weight is and placed as it is, or over the batch axis too.

    Raises:
        StageError: the layout does not fit the weights or the mesh.
    """
    backbone = build_backbone(architecture, dtype)
    if lora is not None:
        lora_kernels.declare(backbone, lora)
    placements = lay_out(layout, weight_loading.weights_of(backbone), mesh)
    if lora is None:
        return placements
    trained = {variable.path for variable in backbone.trainable_variables}
    slots = [
        lay_out_slot(
            layout, Weight(f"{each.weight.path}/{slot}", each.weight.shape, each.weight.dtype, "optimizer"), each, mesh
        )
        for each in placements
        if each.weight.path in trained
        for slot in SLOTS
    ]
    return [*placements, *slots]


def count_parameters(placements: Sequence[Placement]) -> int:
    """Return the number of the model's parameters, LoRA kernels included."""
    return sum(each.weight.parameters for each in placements if each.weight.kind != "optimizer")


def count_trainable(placements: Sequence[Placement]) -> int:
    """Return the number of parameters that have optimizer slots."""
    return sum(math.prod(each.weight.shape) for each in placements if each.weight.kind == "optimizer") // len(SLOTS)
