"""The fine-tuning run: from windows and a baseline to trained weights and what happened on the way.

Purpose: what `stages/finetune.py` strings together.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.core import adapter, loading, lora, measures
from stages.core.errors import StageError
from stages.core.params import Finetune
from stages.core.variants import LoadedModel, Preset, declare_model, fill_model

if TYPE_CHECKING:
    import keras
    import numpy as np


@dataclass(frozen=True)
class Result:
    """What a run leaves beside its weights."""

    curve: list[dict[str, Any]]
    step_seconds: list[float]
    total_parameters: int
    trainable_parameters: int
    peak_host_bytes: int
    optimizer: keras.optimizers.Optimizer

    def metrics(self) -> dict[str, float | int]:
        """Return `data/metrics/finetune.json`.

        The first step holds the compilation; what it took beyond a usual step is `compile_seconds`. First and last
        loss are means over up to 10 steps, since single batches scatter.
        """
        steady = self.step_seconds[1:] or self.step_seconds
        median = statistics.median(steady)
        losses = [row["loss"] for row in self.curve]
        tokens = [row["tokens_per_second"] for row in self.curve[1:] or self.curve]
        return {
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "steps": len(losses),
            "loss_first": round(statistics.fmean(losses[:10]), 4),
            "loss_last": round(statistics.fmean(losses[-10:]), 4),
            "tokens_per_second": round(statistics.median(tokens), 1),
            "step_seconds_median": round(median, 4),
            "compile_seconds": round(max(self.step_seconds[0] - median, 0.0), 2),
            "peak_host_bytes": self.peak_host_bytes,
        }


def load_trainable(preset: Preset, description: dict[str, Any], settings: Finetune) -> LoadedModel:
    """Load the baseline with LoRA kernels at their first values, or with every weight trainable for rank 0."""
    if description["base"] != preset.fingerprint:
        raise StageError("models/baseline was made from another preset than models/preset names. Run `dvc repro`.")
    tuning = {"rank": settings.rank, "alpha": settings.alpha, "targets": settings.targets}
    model = declare_model(description, preset.architecture, tuning)
    first = {
        weight.path: lora.first_value(weight.path, weight.shape, settings.seed)
        for weight in loading.weights_of(model.backbone)
        if weight.kind == "lora"
    }
    fill_model(model, preset, first)
    return model


def describe(settings: Finetune) -> dict[str, Any]:
    """Return what `model.json` and the weights file say of the tuning."""
    return {
        "file": adapter.FILE[settings.rank > 0],
        "rank": settings.rank,
        "alpha": None if settings.rank == 0 else settings.alpha if settings.alpha is not None else float(settings.rank),
        "targets": list(settings.targets) if settings.rank else [],
    }


def fit(model: LoadedModel, windows: Mapping[str, Mapping[str, np.ndarray]], settings: Finetune) -> Result:
    """Train with Keras' `fit` and its progress bar."""
    import sys

    from stages.core.batches import Batches
    from stages.core.causal import make_model, pin_to_mesh
    from stages.core.curve import Curve
    from stages.core.optimizer import make_optimizer

    causal = make_model(model.backbone, model.mesh, model.placements)
    optimizer = make_optimizer(settings)
    causal.compile(optimizer=optimizer, loss=None, jit_compile=True)
    optimizer.build(causal.trainable_variables)
    pin_to_mesh(causal, model.mesh)
    batches = Batches(
        windows["train"], settings.batch_size, model.mesh_shape, seed=settings.seed, epochs=settings.epochs
    )
    held_out = Batches(windows["validation"], settings.batch_size, model.mesh_shape)
    length = windows["train"]["token_ids"].shape[1]
    curve = Curve(settings.batch_size * length, settings.steps)
    causal.fit(
        batches,
        epochs=settings.epochs,
        validation_data=held_out,
        shuffle=False,
        callbacks=[curve],
        # A bar where someone looks, a line an epoch in a log.
        verbose=1 if sys.stdout.isatty() else 2,
    )
    return Result(
        curve.rows,
        curve.seconds,
        sum(_count(variable.shape) for variable in model.backbone.variables),
        sum(_count(variable.shape) for variable in causal.trainable_variables),
        measures.peak_host_bytes(),
        optimizer,
    )


def trained_arrays(model: LoadedModel) -> dict[str, np.ndarray]:
    """Return the trained weights by path, gathered on the host."""
    import numpy as np

    return {variable.path: np.asarray(variable.value) for variable in model.backbone.trainable_variables}


def _count(shape: tuple[int, ...]) -> int:
    size = 1
    for dimension in shape:
        size *= dimension
    return size
