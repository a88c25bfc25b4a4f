"""The training run: a trainable model, its checkpoints, and the calls of Keras' `fit`."""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stages.core.adapters import start
from stages.core.common.errors import ParamsError, StageError
from stages.core.common.paths import TOKENS, Paths
from stages.core.config.schema import Finetune
from stages.core.config.section import IN_FULL, IN_FULL_DTYPES, without
from stages.core.files import sha256
from stages.core.finetune import fingerprint, resuming
from stages.core.finetune.callback import FitSetup, TrainingCallback, bit_sums
from stages.core.finetune.checkpoint import Store
from stages.core.finetune.history import History
from stages.core.finetune.late_logs import LateLogs
from stages.core.finetune.optimizer import Schedule, build_slots, make_optimizer
from stages.core.finetune.result import Result, result_of
from stages.core.finetune.resuming import Checkpoint
from stages.core.finetune.run_state import RunState
from stages.core.finetune.signals import Interruption
from stages.core.generate import prompting
from stages.core.generate.sampling import Sampler, SamplerSettings
from stages.core.load import adapter, lora_kernels, weight_loading
from stages.core.load.chosen_codes import ChosenCodes
from stages.core.load.variants import LoadedModel, Preset, declare_model, fill_model
from stages.core.model.causal_lm import CausalModel, make_model, pin_to_mesh
from stages.core.presets.architecture import of_backbone
from stages.core.presets.tokenizer import Tokenizer
from stages.core.processes.group import SAVE_LIMIT, current
from stages.core.records.finetune import Step
from stages.core.records.layout import LoraConfig
from stages.core.records.model_config import ModelConfig, TunedWeights
from stages.core.sharding.hosts import whole
from stages.core.sharding.mesh import warn_of_slow_network
from stages.core.tokenize.batches import Batches
from stages.core.tokenize.chat import ChatTemplate

logger = logging.getLogger(__name__)


def load_trainable(
    preset: Preset,
    config: ModelConfig,
    settings: Finetune,
    start_from: Path | None = None,
    chosen: ChosenCodes | None = None,
) -> LoadedModel:
    """Load the baseline with LoRA kernels at their initial values, or with every weight trainable for rank 0.

    Args:
        preset: from `open_preset`.
        config: the baseline's `model.json`.
        settings: the training settings.
        start_from: the folder of an adapter whose values are the initial ones; None for new ones.
        chosen: from `variants.codes_of`.

    Raises:
        StageError: the baseline was made from another preset, or in a dtype too coarse for full fine-tuning, or the
            adapter does not fit it.
    """
    if config.base != preset.fingerprint:
        raise StageError("models/baseline was made from another preset than models/preset names. Run `dvc repro`.")
    if settings.rank == 0 and config.dtype not in IN_FULL_DTYPES:
        raise StageError(f"load.dtype {IN_FULL}. Received: models/baseline in {config.dtype}, finetune.rank=0.")
    model = declare_model(config, preset.architecture, settings.lora)
    shapes = {each.path: each.shape for each in weight_loading.weights_of(model.backbone) if each.kind == "lora"}
    if start_from is None:
        first = {path: lora_kernels.first_value(path, shape, settings.seed) for path, shape in shapes.items()}
    else:
        first = start.starting_kernels(start_from, preset, settings.lora, shapes)
    fill_model(model, preset, first, chosen=chosen)
    return model


def describe(lora: LoraConfig) -> TunedWeights:
    """Return what `model.json` and the weights file say of what was trained."""
    return TunedWeights(file=adapter.FILE[lora.rank > 0], rank=lora.rank, alpha=lora.alpha, targets=lora.targets)


def make_causal(model: LoadedModel, settings: Finetune) -> CausalModel:
    """Return the model to train as the settings say, not yet compiled."""
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
    start_from: Path | None = None,
) -> Store | None:
    """Return this run's checkpoints, or None if it is to have none.

    The run is identified by all that its weights depend on beyond float32 rounding: settings, tokens, base, the adapter
    it starts from, dtype, platform, code and packages. Mesh, layout and the number of processes are where a run
    computes, not what: it may resume on others.

    Args:
        paths: of the tokens.
        config: the baseline's `model.json`.
        platform: of the devices: cpu, tpu or gpu.
        settings: the training settings.
        start_from: the folder of the adapter that the run continues.
    """
    if settings.checkpoint_every is None:
        return None
    parts = fingerprint.with_program(
        {
            "settings": without(settings, "display"),
            "tokens": {split: sha256(paths.read(file)) for split, file in TOKENS.items()},
            **{key: found for key in ("base", "dtype", "codes") if (found := config.content().get(key)) is not None},
            "platform": platform,
            "start": None if start_from is None else start.digest(start_from),
        }
    )
    layout = {"mesh": list(config.mesh.shape), "processes": current().count, "rules": config.content()["layout"]}
    store = Store(fingerprint.fingerprint_of(parts), settings.checkpoint_keep, layout)
    if current().first:
        fingerprint.record(store.folder, parts)
    return store


def other_layout(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what a user is to know of a checkpoint that was written on another layout, nothing of the same.

    Args:
        then: the layout of the checkpoint, as `checkpoints` gives it.
        now: of this run.
    """
    if then == now:
        return ""
    was, is_now = (
        f"mesh {each['mesh']}, layout {each['rules']['name']}, processes {each['processes']}" for each in (then, now)
    )
    return f", written on another layout ({was}; now {is_now}): equal to float32 rounding, not to the byte"


def check_length(settings: Finetune, batches: int, steps: int) -> None:
    """Check the settings against the run's length; warn of each that has no effect.

    Args:
        settings: the training settings.
        batches: per epoch.
        steps: updates of the whole run.

    Raises:
        ParamsError: more batches are to be accumulated than an epoch has.
    """
    if settings.gradient_accumulation > batches:
        raise ParamsError(
            f"finetune.gradient_accumulation must be at most the batches of an epoch, {batches}. "
            f"Received: finetune.gradient_accumulation={settings.gradient_accumulation}."
        )
    every = settings.validate_every or math.ceil(batches / settings.gradient_accumulation)
    without_effect = {
        "warmup_steps": (settings.warmup_steps >= steps, "the learning rate never reaches finetune.learning_rate"),
        "early_stopping": (
            settings.early_stopping is not None and steps <= every,
            "the validation loss is measured once; set a smaller finetune.validate_every",
        ),
        "steps": (settings.steps is not None and settings.steps > steps, "the epochs end before"),
    }
    for name, (idle, why) in without_effect.items():
        if idle:
            value = getattr(settings, name)
            logger.warning(f"finetune.{name}={value} does nothing in a run of {steps} steps: {why}.")


def fit(
    model: LoadedModel,
    sequences: Mapping[str, Mapping[str, np.ndarray]],
    settings: Finetune,
    *,
    store: Store | None = None,
    tokenizer: Tokenizer | None = None,
    chat_template: bool = False,
    show_curve: Callable[[list[Step]], None] | None = None,
    profile: Path | None = None,
    load_seconds: float = 0.0,
) -> Result:
    """Train with Keras' `fit` and its progress bar, from the newest checkpoint if there is one.

    Args:
        model: the baseline, with an adapter at its first values or all weights trainable.
        sequences: of `train` and `validation`.
        settings: the training settings.
        store: the run's checkpoints; None: none are read or written, and signals act as usual.
        tokenizer: for samples; None: none are made.
        chat_template: apply the chat template to the sample prompt.
        show_curve: called with all steps so far now and then, for views that follow a run.
        profile: folder for a JAX profile of a few steps.
        load_seconds: time that loading the model took, for the metrics.

    Raises:
        ParamsError: a setting is not possible in a run of this length.
        StageError: the loss or a weight is not finite, other steps or tokens were trained than asked for, or training
            changed no weight.
        Stopped: the process received a signal; the run's state is saved.
    """
    causal = make_causal(model, settings)
    options = {"seed": settings.seed, "accumulation": settings.gradient_accumulation}
    make_batches = functools.partial(Batches, sequences["train"], settings.batch_size, model.mesh_shape, **options)
    epoch = make_batches()
    steps = min(settings.epochs * epoch.steps_per_epoch, settings.steps or sys.maxsize)
    check_length(settings, epoch.batches_per_epoch, steps)
    rows = model.mesh_shape.sizes["batch"]
    warn_of_slow_network(model.jax_mesh, model.model_axis_bytes, epoch.positions_per_step // rows)
    _compile(causal, model, settings, steps)
    check_changed = _change_check(causal, settings, steps)
    checkpoint = resuming.newest(store) if store else None
    history = History.from_state(checkpoint.state) if checkpoint else History()
    history.seconds["load"] += load_seconds
    held_out = {name: array[: settings.validate_sequences] for name, array in sequences["validation"].items()}
    setup = FitSetup(
        settings,
        steps=steps,
        steps_per_epoch=epoch.steps_per_epoch,
        positions_per_step=epoch.positions_per_step,
        rate=Schedule(settings, steps).on_host,
        reviews=sequences["train"].get("review"),
        # No backward pass holds activations, so more sequences fit into a batch, and fewer calls cost less.
        held_out=Batches(held_out, 4 * settings.batch_size, model.mesh_shape),
        store=store,
        sample=_sampler(causal, tokenizer, settings, chat_template) if tokenizer and settings.sample_every else None,
        show_curve=show_curve,
        profile=profile,
    )
    _train(causal, setup, history, checkpoint, make_batches)
    check_changed()
    return result_of(model, causal, history, epoch, sequences["train"]["token_ids"].shape[1])


def _compile(causal: CausalModel, model: LoadedModel, settings: Finetune, steps: int) -> None:
    """Compile the model with an optimizer whose state is on the mesh."""
    optimizer = make_optimizer(settings, steps)
    causal.compile(optimizer=optimizer, loss=None, jit_compile=True)
    build_slots(optimizer, model, causal.trainable_variables)
    pin_to_mesh(causal, model.jax_mesh)


def _train(
    causal: CausalModel,
    setup: FitSetup,
    history: History,
    checkpoint: Checkpoint | None,
    make_batches: Callable[..., Batches],
) -> None:
    """Run all steps that are left after the checkpoint; with early stopping restore the best weights."""
    with Interruption(enabled=setup.store is not None) as interruption:
        callback = TrainingCallback(setup, history, interruption, RunState(causal))
        callback.set_model(causal)
        if checkpoint:
            callback.restore(checkpoint)
            logger.info(
                f"Resuming from the checkpoint after step {checkpoint.step} of {setup.steps}"
                f"{other_layout(checkpoint.layout, setup.store.layout if setup.store else {})}."
            )
        _run_steps(causal, callback, setup, make_batches)
        callback.wait_for_checkpoint()
    current().doing("the end of the training", SAVE_LIMIT)
    callback.restore_best()
    callback.check_finite()


def _run_steps(
    causal: CausalModel, callback: TrainingCallback, setup: FitSetup, make_batches: Callable[..., Batches]
) -> None:
    """Call Keras' `fit` until no step is left.

    Keras takes the first epoch's length for all, so the rest of an epoch that was begun before, and the part of an
    epoch in which `finetune.steps` ends, are a `fit` of their own.
    """
    history, per_epoch = callback.history, setup.steps_per_epoch
    while not callback.finished:
        before = history.steps
        epoch, within = divmod(before, per_epoch)
        left = setup.steps - before
        whole_epochs = 0 if within else left // per_epoch
        end_step = None if whole_epochs else min(per_epoch, within + left)
        callback.batches = make_batches(first_step=within, end_step=end_step)
        causal.fit(
            callback.batches,
            initial_epoch=epoch,
            epochs=epoch + max(whole_epochs, 1),
            shuffle=False,
            callbacks=LateLogs(
                callback,
                add_progbar=True,
                model=causal,
                # A progress bar at a terminal, one line per epoch in a log.
                verbose=1 if sys.stdout.isatty() else 2,
                epochs=epoch + max(whole_epochs, 1),
                steps=len(callback.batches),
            ),
        )
        if history.steps == before:
            raise StageError(
                f"Keras must run the remaining steps. Received: none after step {before} of {setup.steps}."
            )


def _change_check(causal: CausalModel, settings: Finetune, steps: int) -> Callable[[], None]:
    """Return a function that raises a StageError if training has changed no bit of the weights since now."""
    # An adapter whose B stays zero changes nothing, whatever its A has become.
    acting = [variable for variable in causal.trainable_variables if not variable.path.endswith("lora_kernel_a")]
    untrained = whole(bit_sums([variable.value for variable in acting]))

    def check() -> None:
        if np.array_equal(untrained, whole(bit_sums([variable.value for variable in acting]))):
            raise StageError(
                f"Training changed no bit of the weights. Received: steps={steps}, "
                f"learning_rate={settings.learning_rate}, epsilon={settings.epsilon}, dtype={acting[0].dtype}. "
                "No weights were written. Set a higher finetune.learning_rate (or a smaller epsilon or warmup_steps), "
                "or a load.dtype of higher precision."
            )

    return check


def _sampler(causal: CausalModel, tokenizer: Tokenizer, settings: Finetune, chat_template: bool) -> Callable[[], str]:
    """Return a function that continues the sample prompt, compiled once."""
    template = None
    if chat_template:
        template = ChatTemplate(tokenizer, empty_thought=of_backbone(causal.backbone).empty_thought)
    prompts, stops = prompting.encode(tokenizer, [settings.sample_prompt], template)
    sampler = Sampler(causal)
    greedy = SamplerSettings(settings.sample_tokens, stops, pieces=tokenizer.vocabulary_size)
    return lambda: tokenizer.decode(sampler(prompts, greedy)[0])


def trained_arrays(model: LoadedModel) -> dict[str, np.ndarray]:
    """Return the trained weights by path, gathered on the host of the first process; none on the others."""
    found = {}
    for variable in model.backbone.trainable_variables:
        # All take part in gathering, one weight at a time.
        value = whole(variable.value)
        if current().first:
            found[variable.path] = value
    return found
