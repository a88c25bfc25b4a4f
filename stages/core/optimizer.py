"""The optimizer, its learning rate at each step, and where its slots lie on the mesh."""

from __future__ import annotations

import math
from typing import Any

import keras

from stages.core.layout import Placement, Weight, place
from stages.core.params import Finetune
from stages.core.variants import LoadedModel


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
            steps: batches of the whole run.
        """
        super().__init__()
        self._peak = settings.learning_rate
        self._shape = settings.schedule
        self._warmup = settings.warmup_steps
        self._steps = steps

    def __call__(self, step: Any) -> Any:
        """Return the learning rate of a step, counted from 0, as a float32 scalar."""
        ops = keras.ops
        step = ops.cast(step, "float32")
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
        steps: batches of the whole run, which the schedule ends with.
    """
    changes = settings.schedule != "constant" or settings.warmup_steps > 0
    accumulation = settings.gradient_accumulation
    optimizer = keras.optimizers.AdamW(
        learning_rate=Schedule(settings, steps) if changes else settings.learning_rate,
        weight_decay=settings.weight_decay,
        global_clipnorm=settings.clip_norm,
        gradient_accumulation_steps=accumulation if accumulation > 1 else None,
    )
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
