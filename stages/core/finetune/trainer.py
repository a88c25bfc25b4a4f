"""The fine-tuning run: from windows and a baseline to trained weights and what happened on the way.

Purpose: what `stages/finetune.py` strings together.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core.common import host_memory
from stages.core.common.errors import ParamsError, StageError
from stages.core.common.paths import TOKENS, Paths
from stages.core.config.schema import IN_FULL, NOT_IN_FULL, Finetune, without
from stages.core.files import sha256
from stages.core.finetune import fingerprint, flops
from stages.core.finetune.checkpoint import Store
from stages.core.load import adapter, lora_kernels, weight_loading
from stages.core.load.variants import LoadedModel, Preset, declare_model, fill_model
from stages.core.records.finetune import FinetuneMetrics, Step
from stages.core.records.layout import LoraConfig
from stages.core.records.model_config import ModelConfig, TunedWeights

if TYPE_CHECKING:
    import keras
    import numpy as np

    from stages.core.finetune.callback import History
    from stages.core.model.causal_lm import CausalModel
    from stages.core.presets.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run leaves beside its weights."""

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
    optimizer: keras.optimizers.Optimizer

    def metrics(self) -> FinetuneMetrics:
        """Return `data/metrics/finetune.json`."""
        history = self.history
        first = set(history.first_steps)
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
            checkpoint_seconds=round(history.seconds["checkpoint"], 2),
            peak_host_bytes=self.peak_host_bytes,
            peak_device_bytes=self.peak_device_bytes,
            state_bytes_per_device=self.state_bytes,
            step_growth_bytes=history.step_growth,
            flops_per_step=self.flops_per_step,
            flops_per_second_of_matrix_product=round(self.matrix_product_rate),
            flops_share_of_peak=round(self.flops_per_step / median / (self.matrix_product_rate * self.devices), 4),
        )


def _mean_loss(steps: Sequence[Step]) -> float:
    """Return the mean loss over the tokens of some steps."""
    return statistics.fmean([step.loss for step in steps], [max(step.tokens, 1e-9) for step in steps])


def load_trainable(preset: Preset, config: ModelConfig, settings: Finetune) -> LoadedModel:
    """Load the baseline with LoRA kernels at their first values, or with every weight trainable for rank 0.

    Raises:
        StageError: the baseline was made from another preset, or in a dtype in which nothing is learnt.
    """
    if config.base != preset.fingerprint:
        raise StageError("models/baseline was made from another preset than models/preset names. Run `dvc repro`.")
    if settings.rank == 0 and config.dtype == NOT_IN_FULL:
        raise StageError(f"load.dtype {IN_FULL}. Received: models/baseline in {NOT_IN_FULL}, finetune.rank=0.")
    model = declare_model(config, preset.architecture, settings.lora)
    first = {
        weight.path: lora_kernels.first_value(weight.path, weight.shape, settings.seed)
        for weight in weight_loading.weights_of(model.backbone)
        if weight.kind == "lora"
    }
    fill_model(model, preset, first)
    return model


def describe(lora: LoraConfig) -> TunedWeights:
    """Return what `model.json` and the weights file say of what was trained."""
    return TunedWeights(file=adapter.FILE[lora.rank > 0], rank=lora.rank, alpha=lora.alpha, targets=lora.targets)


def make_causal(model: LoadedModel, settings: Finetune) -> CausalModel:
    """Return the model to train as the settings say, not yet compiled."""
    from stages.core.model.causal_lm import make_model

    return make_model(
        model.backbone,
        model.jax_mesh,
        model.placements,
        rematerialize=settings.rematerialize,
        dropout=settings.lora_dropout,
        seed=settings.seed,
    )


def checkpoints(
    paths: Paths,
    config: ModelConfig,
    platform: str,
    settings: Finetune,
) -> Store | None:
    """Return where this run's checkpoints lie, or None if it is to have none.

    The run is told from others by all that its weights follow from: settings, tokens, base, dtype, mesh, layout,
    platform, code and packages.

    Args:
        paths: where the tokens lie.
        config: the baseline's `model.json`.
        platform: of the devices: cpu, tpu or gpu.
        settings: the training settings.
    """
    if settings.checkpoint_every is None:
        return None
    parts = fingerprint.with_program(
        {
            "settings": without(settings, "display"),
            "tokens": {split: sha256(paths.read(file)) for split, file in TOKENS.items()},
            **{key: config.content()[key] for key in ("base", "dtype", "mesh", "layout")},
            "platform": platform,
        }
    )
    store = Store(fingerprint.fingerprint_of(parts), settings.checkpoint_keep)
    fingerprint.record(store.folder, parts)
    return store


def check_length(settings: Finetune, batches: int, steps: int) -> None:
    """Compare the settings with the run's length, now that it is known: tell of each that cannot act.

    Args:
        settings: the training settings.
        batches: of an epoch.
        steps: updates of the whole run.

    Raises:
        ParamsError: more batches are to be accumulated than there are.
    """
    if settings.gradient_accumulation > batches:
        raise ParamsError(
            f"finetune.gradient_accumulation must be at most the batches of an epoch, {batches}. "
            f"Received: finetune.gradient_accumulation={settings.gradient_accumulation}."
        )
    every = settings.validate_every or math.ceil(batches / settings.gradient_accumulation)
    told = {
        "warmup_steps": (settings.warmup_steps >= steps, "the step size never reaches finetune.learning_rate"),
        "early_stopping": (
            settings.early_stopping is not None and steps <= every,
            "the validation loss is measured once; set a smaller finetune.validate_every",
        ),
        "steps": (settings.steps is not None and settings.steps > steps, "the epochs end before"),
    }
    for name, (idle, why) in told.items():
        if idle:
            value = getattr(settings, name)
            logger.warning(f"finetune.{name}={value} does nothing in a run of {steps} steps: {why}.")


def fit(
    model: LoadedModel,
    windows: Mapping[str, Mapping[str, np.ndarray]],
    settings: Finetune,
    *,
    store: Store | None = None,
    tokenizer: Tokenizer | None = None,
    turns: bool = False,
    profile: Path | None = None,
    load_seconds: float = 0.0,
) -> Result:
    """Train with Keras' `fit` and its progress bar, from the newest checkpoint if there is one.

    Args:
        model: the baseline, with an adapter at its first values or all weights trainable.
        windows: of `train` and `validation`.
        settings: the training settings.
        store: the run's checkpoints; None: none are read or written, and signals act as usual.
        tokenizer: for samples; None: none are made.
        turns: put the sample prompt in the turn format.
        profile: folder for a JAX profile of a few steps.
        load_seconds: what loading the model took, for the metrics.

    Raises:
        ParamsError: a setting does not go with the run's length.
        StageError: the numbers are no longer finite, other steps or tokens were trained than were asked for, or the
            trained weights are what they were.
        Stopped: the process was told to stop; the run's state is kept.
    """
    import sys

    import numpy as np

    from stages.core.finetune.callback import History, Plan, Watch, bit_sums
    from stages.core.finetune.optimizer import make_optimizer
    from stages.core.finetune.signals import Interruption
    from stages.core.model.causal_lm import pin_to_mesh
    from stages.core.tokenize.batches import Batches

    causal = make_causal(model, settings)

    def batches(first_step: int = 0, end_step: int | None = None) -> Batches:
        return Batches(
            windows["train"],
            settings.batch_size,
            model.mesh_shape,
            seed=settings.seed,
            first_step=first_step,
            end_step=end_step,
            accumulation=settings.gradient_accumulation,
        )

    length = windows["train"]["token_ids"].shape[1]
    one_epoch = batches()
    per_epoch = one_epoch.steps_per_epoch
    total = min(settings.epochs * per_epoch, settings.steps or settings.epochs * per_epoch)
    check_length(settings, one_epoch.batches_per_epoch, total)
    optimizer = make_optimizer(settings, total)
    causal.compile(optimizer=optimizer, loss=None, jit_compile=True)
    optimizer.build(causal.trainable_variables)
    pin_to_mesh(causal, model.jax_mesh)
    # An adapter whose B stays zero changes nothing, whatever its A has become.
    acting = [each for each in causal.trainable_variables if not each.path.endswith("lora_kernel_a")]
    untrained = np.asarray(bit_sums([each.value for each in acting]))
    if store:
        store.hold()
    found = store.newest() if store else None
    history = History.from_state(found.state) if found else History()
    history.seconds["load"] += load_seconds
    plan = Plan(
        settings,
        steps=total,
        steps_per_epoch=per_epoch,
        positions_per_step=one_epoch.positions_per_step,
        reviews=windows["train"].get("review"),
        # Nothing is kept for a backward pass, so more fit at a time, and fewer calls cost less.
        held_out=Batches(windows["validation"], 4 * settings.batch_size, model.mesh_shape),
        store=store,
        sample=_sampler(causal, tokenizer, settings, turns) if tokenizer and settings.sample_every else None,
        profile=profile,
    )
    with Interruption() if store else contextlib.nullcontext() as interruption:
        watch = Watch(plan, history, interruption or Interruption())
        watch.set_model(causal)
        if found:
            watch.restore(found)
            logger.info(f"Going on from the checkpoint after step {found.step} of {total}.")
        while not watch.finished:
            before = history.steps
            epoch, within = divmod(before, per_epoch)
            # Keras takes the first epoch's length for all: the rest of one that was begun before, and the part of one
            # that `finetune.steps` ends in, are a `fit` of their own.
            whole = 0 if within else (total - before) // per_epoch
            watch.batches = batches(within, None if whole else min(per_epoch, within + total - before))
            causal.fit(
                watch.batches,
                initial_epoch=epoch,
                epochs=epoch + max(whole, 1),
                shuffle=False,
                callbacks=[watch],
                # A bar where someone looks, a line an epoch in a log.
                verbose=1 if sys.stdout.isatty() else 2,
            )
            if history.steps == before:
                raise StageError(
                    f"Keras must do the steps that are left. Received: none after step {before} of {total}."
                )
    watch.restore_best()
    watch.check_finite()
    if np.array_equal(untrained, bit_sums([each.value for each in acting])):
        raise StageError(
            f"Training changed no bit of the weights. Received: steps={total}, learning_rate={settings.learning_rate}, "
            f"epsilon={settings.epsilon}, dtype={acting[0].dtype}. Nothing was overwritten. Set a higher "
            "finetune.learning_rate (or a smaller epsilon or warmup_steps), or a load.dtype of more digits."
        )
    return Result(
        history,
        total_parameters=sum(math.prod(variable.shape) for variable in model.backbone.variables),
        trainable_parameters=sum(math.prod(variable.shape) for variable in causal.trainable_variables),
        peak_host_bytes=host_memory.peak_host_bytes(),
        peak_device_bytes=_peak_device_bytes(),
        state_bytes=_state_bytes(causal),
        flops_per_step=flops.step_flops(model.backbone, one_epoch.batch_size * settings.gradient_accumulation, length),
        positions_per_step=one_epoch.positions_per_step,
        matrix_product_rate=flops.matrix_product_rate(),
        # Simulated devices are the same cores.
        devices=1 if model.platform == "cpu" else model.mesh_shape.devices,
        optimizer=optimizer,
    )


def _sampler(causal: CausalModel, tokenizer: Tokenizer, settings: Finetune, turns: bool) -> Callable[[], str]:
    """Return a function that continues the sample prompt, compiled once."""
    from stages.core.generate import prompting
    from stages.core.generate.sampling import Sampler, SamplerSettings

    prompts, stops = prompting.encode(tokenizer, [settings.sample_prompt], turns=turns)
    sampler = Sampler(causal, SamplerSettings(settings.sample_tokens, 0.0, None, stops, tokenizer.vocabulary_size))
    return lambda: tokenizer.decode(sampler(prompts, 0)[0])


def trained_arrays(model: LoadedModel) -> dict[str, np.ndarray]:
    """Return the trained weights by path, gathered on the host."""
    import numpy as np

    return {variable.path: np.asarray(variable.value) for variable in model.backbone.trainable_variables}


def _state_bytes(causal: CausalModel) -> int:
    """Return the bytes of the step's state that lie on the first device."""
    variables = {id(each): each for each in [*causal.variables, *causal.metrics_variables, *causal.optimizer.variables]}
    return sum(each.value.addressable_shards[0].data.nbytes for each in variables.values())


def _peak_device_bytes() -> int | None:
    """Return the largest memory that any device has held so far, in bytes, or None where the backend does not tell."""
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None
