"""The result of a training run, and its metrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import keras

from stages.core.common import host_memory
from stages.core.finetune import flops
from stages.core.finetune.history import History
from stages.core.load.variants import LoadedModel
from stages.core.model.causal_lm import CausalModel
from stages.core.records.finetune import FinetuneMetrics, Step
from stages.core.tokenize.batches import Batches


@dataclass(frozen=True)
class Result:
    """What a run leaves in addition to its weights."""

    history: History
    total_parameters: int
    trainable_parameters: int
    peak_host_bytes: int
    peak_device_bytes: int | None
    state_bytes: int
    flops_per_step: int
    positions_per_step: int
    matrix_product_rate: float
    devices: int
    device_kind: str
    optimizer: keras.optimizers.Optimizer

    def metrics(self) -> FinetuneMetrics:
        """Return `data/metrics/finetune.json`, over all processes of the run."""
        history = self.history
        first, busiest = set(history.first_steps), history.busiest_expert
        steady = [i for i in range(history.steps) if i not in first] or list(range(history.steps))
        median = statistics.median(history.step_seconds[i] for i in steady)
        return FinetuneMetrics(
            total_parameters=self.total_parameters,
            trainable_parameters=self.trainable_parameters,
            steps=history.steps,
            tokens=sum(row.tokens for row in history.rows),
            loss_first=round(_mean_loss(history.rows[:10]), 4),
            loss_last=round(_mean_loss(history.rows[-10:]), 4),
            tokens_per_second=round(statistics.fmean(history.rows[i].tokens for i in steady) / median, 1),
            positions_per_second=round(self.positions_per_step / median, 1),
            step_seconds_median=round(median, 4),
            compile_seconds=round(sum(max(history.step_seconds[i] - median, 0.0) for i in first), 2),
            load_seconds=round(history.seconds["load"], 2),
            train_seconds=round(sum(history.step_seconds), 2),
            validation_seconds=round(history.seconds["validation"], 2),
            sample_seconds=round(history.seconds["sample"], 2),
            checkpoint_seconds=round(history.seconds["checkpoint"], 4),
            peak_host_bytes=self.peak_host_bytes,
            peak_device_bytes=self.peak_device_bytes,
            state_bytes_per_device=self.state_bytes,
            step_growth_bytes=history.step_growth,
            flops_per_step=self.flops_per_step,
            flops_per_second_of_matrix_product=round(self.matrix_product_rate),
            flops_share_of_peak=round(self.flops_per_step / median / (self.matrix_product_rate * self.devices), 4),
            device_kind=self.device_kind,
            busiest_expert_share=round(statistics.fmean(busiest), 4) if busiest else None,
        )


def _mean_loss(steps: Sequence[Step]) -> float:
    """Return the mean loss over the tokens of some steps."""
    return statistics.fmean([step.loss for step in steps], [max(step.tokens, 1e-9) for step in steps])


def result_of(model: LoadedModel, causal: CausalModel, history: History, epoch: Batches, length: int) -> Result:
    """Measure a run that has ended.

    Args:
        model: with the trained weights.
        causal: the same as a Keras model, compiled.
        history: of the run.
        epoch: the batches of an epoch.
        length: tokens per sequence.
    """
    return Result(
        history,
        total_parameters=sum(each.weight.parameters for each in model.placements),
        trainable_parameters=sum(math.prod(variable.shape) for variable in causal.trainable_variables),
        peak_host_bytes=host_memory.peak_host_bytes(),
        peak_device_bytes=_peak_device_bytes(),
        state_bytes=_state_bytes(causal),
        flops_per_step=flops.step_flops(model.backbone, epoch.batch_size * epoch.accumulation, length),
        positions_per_step=epoch.positions_per_step,
        matrix_product_rate=flops.matrix_product_rate(),
        # Simulated devices share the same cores.
        devices=1 if model.platform == "cpu" else model.mesh_shape.devices,
        device_kind=jax.local_devices()[0].device_kind,
        optimizer=causal.optimizer,
    )


def _state_bytes(causal: CausalModel) -> int:
    """Return the bytes of the step's state on the first device."""
    variables = {id(each): each for each in [*causal.variables, *causal.metrics_variables, *causal.optimizer.variables]}
    return sum(each.value.addressable_shards[0].data.nbytes for each in variables.values())


def _peak_device_bytes() -> int | None:
    """Return the largest memory that any device has held so far, in bytes; None if the backend does not report it."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None
