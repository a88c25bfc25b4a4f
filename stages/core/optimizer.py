"""The optimizer, and where its slots lie on the mesh."""

from __future__ import annotations

import keras

from stages.core.layout import Placement, Weight, place
from stages.core.params import Finetune
from stages.core.variants import LoadedModel


def make_optimizer(settings: Finetune) -> keras.optimizers.Optimizer:
    """Return AdamW with decoupled weight decay on everything but biases and norm scales, as in the tutorial."""
    optimizer = keras.optimizers.AdamW(learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    return optimizer


def optimizer_placements(model: LoadedModel, optimizer: keras.optimizers.Optimizer) -> list[Placement]:
    """Return where the optimizer's slots lie: each with the weight it belongs to.

    Raises:
        RuntimeError: a slot lies elsewhere on the devices, which would be a fault of ours.
    """
    by_path = {placement.weight.path.replace("/", "_"): placement for placement in model.placements}
    placements = []
    for variable in optimizer.variables:
        owner = next((path for path in by_path if variable.name.startswith(path)), None)
        if owner is None:
            continue
        placement = by_path[owner]
        slot = Weight(
            f"{placement.weight.path}/{variable.name[len(owner) + 1 :]}",
            tuple(variable.shape),
            str(variable.dtype),
            "optimizer",
        )
        placements.append(place(slot, placement.rule, model.mesh_shape))
        held = variable.value.sharding.shard_shape(tuple(variable.shape))
        if held != placements[-1].shard_shape:
            raise RuntimeError(f"optimizer slot {slot.path} is held as {held}, not {placements[-1].shard_shape}")
    return placements
