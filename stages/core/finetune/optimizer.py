"""The optimizer, its learning rate at each step, and the sharding of its slots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from stages.core.config.schema import Finetune
from stages.core.load.variants import LoadedModel
from stages.core.sharding.layout import Placement, Weight, place
from stages.core.sharding.mesh import MeshShape


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Warm-up, then constant, linear or cosine to zero after the last step.

    The rate of step s (from 0) of n, with w of warm-up and p = (s - w) / (n - w):
        s < w       peak (s + 1) / w
        constant    peak
        linear      peak (1 - p)
        cosine      peak (1 + cos(pi p)) / 2, as in https://arxiv.org/abs/1608.03983 without restarts
    """

    def __init__(self, settings: Finetune, steps: int) -> None:
        """Take the shape from the settings.

        Args:
            settings: learning_rate (the peak), schedule, warmup_steps.
            steps: updates of the whole run.
        """
        super().__init__()
        self._peak = settings.learning_rate
        self._shape = settings.schedule
        self._warmup = settings.warmup_steps
        self._steps = steps

    def __call__(self, step: Any) -> Any:
        """Return the learning rate of a step, counted from 0, as a float32 scalar."""
        return self._rate(keras.ops, keras.ops.cast(step, "float32"))

    def on_host(self, step: int) -> float:
        """Return the learning rate of a step without a device, on which it would wait for the steps in flight."""
        return float(self._rate(np, np.float32(step)))

    def _rate(self, ops: Any, step: Any) -> Any:
        """Return a step's learning rate by the functions of `keras.ops` or NumPy."""
        part = ops.clip((step - self._warmup) / max(self._steps - self._warmup, 1), 0.0, 1.0)
        factor = {
            "constant": ops.ones_like(part),
            "linear": 1.0 - part,
            "cosine": 0.5 * (1.0 + ops.cos(math.pi * part)),
        }[self._shape]
        return self._peak * ops.where(step < self._warmup, (step + 1.0) / max(self._warmup, 1), factor)

    def get_config(self) -> dict[str, Any]:
        """Return what the schedule was made from."""
        return {
            "learning_rate": self._peak,
            "schedule": self._shape,
            "warmup_steps": self._warmup,
            "steps": self._steps,
        }


def make_optimizer(settings: Finetune, steps: int) -> keras.optimizers.Optimizer:
    """Return AdamW with decoupled weight decay on everything but biases and norm scales, as in the tutorial.

    Args:
        settings: the training settings.
        steps: updates of the whole run, which the schedule ends with.
    """
    changes = settings.schedule != "constant" or settings.warmup_steps > 0
    optimizer = keras.optimizers.AdamW(
        learning_rate=Schedule(settings, steps) if changes else settings.learning_rate,
        weight_decay=settings.weight_decay,
        beta_1=settings.beta_1,
        beta_2=settings.beta_2,
        epsilon=settings.epsilon,
        global_clipnorm=settings.clip_norm,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    return optimizer


def slot_placements(
    optimizer: keras.optimizers.Optimizer, placements: Sequence[Placement], mesh: MeshShape
) -> dict[int, Placement]:
    """Return the sharding of the optimizer's slots by their number among its variables, each with its weight.

    Args:
        optimizer: built; its variables need no values.
        placements: of the model's weights.
        mesh: axis names and sizes.
    """
    owners = {each.weight.path.replace("/", "_"): each for each in placements}
    found = {}
    for number, variable in enumerate(optimizer.variables):
        owner = next((path for path in owners if variable.name.startswith(path)), None)
        if owner is not None:
            path = f"{owners[owner].weight.path}/{variable.name[len(owner) + 1 :]}"
            slot = Weight(path, tuple(variable.shape), str(variable.dtype), "optimizer")
            found[number] = place(slot, owners[owner].rule, mesh)
    return found


def optimizer_placements(model: LoadedModel, optimizer: keras.optimizers.Optimizer) -> list[Placement]:
    """Return the sharding of the optimizer's slots, after comparing it with the actual one.

    Raises:
        RuntimeError: internal error: actual and planned sharding differ.
    """
    found = slot_placements(optimizer, model.placements, model.mesh_shape)
    for number, placement in found.items():
        variable = optimizer.variables[number]
        held = variable.value.sharding.shard_shape(tuple(variable.shape))
        if held != placement.shard_shape:
            raise RuntimeError(f"optimizer slot {placement.weight.path} is held as {held}, not {placement.shard_shape}")
    return list(found.values())
