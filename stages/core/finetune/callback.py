"""The Keras callback of a training run: recording, validation, samples, checkpoints, and stopping.

Purpose: it does these in one fixed order after each step, so that a checkpoint holds all that its step did and nothing
of the next.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from stages.core.common.errors import StageError
from stages.core.common.host_memory import Growth
from stages.core.common.paths import REVIEWS
from stages.core.common.progress import ProgressLog
from stages.core.config.schema import Finetune
from stages.core.finetune.checkpoint import Store
from stages.core.finetune.history import History
from stages.core.finetune.profile import StepProfile
from stages.core.finetune.resuming import Checkpoint
from stages.core.finetune.run_state import RunState, put
from stages.core.finetune.signals import SIGNALS, Interruption, Stopped
from stages.core.model.causal_lm import BUSIEST
from stages.core.processes.group import COMPILE_LIMIT, SAMPLE_LIMIT, SAVE_LIMIT, STEP_LIMIT, VALIDATION_LIMIT, current
from stages.core.records.finetune import Sample, Step
from stages.core.sharding.hosts import whole
from stages.core.tokenize.batches import Batches

logger = logging.getLogger(__name__)

# Steps whose memory growth is measured, to report the maximum: early ones may still hold their predecessor's buffers.
MEASURED_STEPS = 8
# Seconds between two writings of the curve, for whoever watches it.
CURVE_SECONDS = 10.0


@dataclass(frozen=True)
class FitSetup:
    """A run's settings, and what follows from them and the data.

    A step is an update of the weights; `rate` gives its learning rate. `reviews` has the review number of each position
    of each training sequence (-1: none). `sample` continues the prompt. `show_curve` is given all steps now and then.
    `store` None: no checkpoints.
    """

    settings: Finetune
    steps: int
    steps_per_epoch: int
    positions_per_step: int
    rate: Callable[[int], float]
    reviews: np.ndarray | None
    held_out: Batches
    store: Store | None
    sample: Callable[[], str] | None
    show_curve: Callable[[list[Step]], None] | None
    profile: Path | None


class TrainingCallback(keras.callbacks.Callback):
    """After each step: record, check, validate, sample, save a checkpoint, stop, in this order.

    It may be called for a step's end when later steps have begun (`late_logs.LateLogs`), unless something `is_due`.
    """

    def __init__(self, setup: FitSetup, history: History, interruption: Interruption, state: RunState) -> None:
        """Continue a history.

        Args:
            setup: the run.
            history: of the steps done so far; it is written into.
            interruption: holds the signal that stops the process, if one was received.
            state: of the model that is trained.
        """
        super().__init__()
        self.history = history
        self.batches: Batches
        self._state = state
        self._setup = setup
        self._interruption = interruption
        self._first_step: int | None = None
        # When each step in flight began, and when it was last called for an end.
        self._began: deque[float] = deque()
        self._told = 0.0
        self._profile = StepProfile(setup.profile)
        self._growth: Growth | None = None
        self._curve_shown = -math.inf
        self._progress = ProgressLog("Step", setup.steps, history.steps)

    @property
    def finished(self) -> bool:
        """Whether no step is left to do."""
        return self.history.stopped_early or self.history.steps >= self._setup.steps

    @property
    def begun(self) -> int:
        """How many steps have begun; those beyond `history.steps` are in flight."""
        return self.history.steps + len(self._began)

    def is_due(self, step: int) -> bool:
        """Whether something is done after a step (counted from 1) that no later one may have begun before.

        To be asked once each step is dispatched, before the next one is: several processes agree here where they stop.
        """
        settings = self._setup.settings
        stops = self._stops_after(step)
        due = [self._validate_every, settings.sample_every, settings.checkpoint_every]
        return (
            step == self._setup.steps
            or any(every and step % every == 0 for every in due)
            or step == self._profile.last
            or stops is not None
        )

    def _stops_after(self, step: int) -> str | None:
        """Return why the run stops after a step, or None; of several processes all stop after the same one."""
        signal = self._interruption.received
        return current().stop_after(step, signal.name if signal else None)

    @property
    def _validate_every(self) -> int:
        return self._setup.settings.validate_every or self._setup.steps_per_epoch

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Choose the epoch's order, and restore the metrics' sums if the run resumes within an epoch."""
        self.batches.epoch = epoch
        self._state.restore_metrics()

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Start the clock, and the profile at the process's second step (or its only one)."""
        step = self.begun
        limit = max(STEP_LIMIT, 10 * max(self.history.step_seconds, default=0.0))
        current().doing(f"step {step + 1}", COMPILE_LIMIT if self._first_step is None else limit)
        if self._first_step is None:
            self._first_step = step
            self.history.first_steps.append(step)
            self._profile.plan(step, self._setup.steps)
        self._profile.begin(step)
        if 1 <= step - self._first_step <= MEASURED_STEPS and jax.default_backend() == "cpu":
            self._growth = Growth()
        self._began.append(time.perf_counter())

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any]) -> None:
        """Record the step, then do what is due after it; reading the loss waits for its computation."""
        setup, history = self._setup, self.history
        self._check_saved()
        loss, accuracy = float(logs["batch_loss"]), float(logs["batch_accuracy"])
        now = time.perf_counter()
        seconds, self._told = now - max(self._began.popleft(), self._told), now
        if self._growth and (grown := self._growth.bytes()) is not None:
            history.step_growth = max(grown, history.step_growth or 0)
        self._growth = None
        step = history.steps + 1
        epoch, within = divmod(step - 1, setup.steps_per_epoch)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}", step)
        tokens, given = int(logs["batch_tokens"]), self.batches.tokens_of(epoch, within)
        if tokens != given:
            raise StageError(f"Step {step} must train all {given} tokens of its sequences. Received: tokens={tokens}.")
        history.step_seconds.append(seconds)
        if BUSIEST in logs:
            history.busiest_expert.append(float(logs[BUSIEST]))
        history.rows.append(
            Step(
                step=step,
                epoch=epoch + 1,
                loss=loss,
                accuracy=accuracy,
                tokens=tokens,
                tokens_per_second=tokens / seconds,
                positions_per_second=setup.positions_per_step / seconds,
                learning_rate=setup.rate(step - 1),
                validation_loss=None,
            )
        )
        self._progress.show(step, f"loss {loss:.3f}")
        if self._began:
            return
        self._profile.end(step)
        if step % self._validate_every == 0 or step == setup.steps:
            self._validate()
        if setup.sample and setup.settings.sample_every and step % setup.settings.sample_every == 0:
            self._sample(setup.sample, step)
        if setup.show_curve and time.monotonic() - self._curve_shown >= CURVE_SECONDS:
            # It is written at the end too, where an error is reported.
            with contextlib.suppress(OSError):
                setup.show_curve(history.rows)
            self._curve_shown = time.monotonic()
        why = self._stops_after(step)
        save_every = setup.settings.checkpoint_every or setup.steps
        if setup.store and not self.finished and (why or step % save_every == 0):
            self._save(setup.store)
        if why and not self.finished:
            saved_step = self.wait_for_checkpoint()
            saved = "which is saved" if saved_step == step else f"and step {saved_step or 'none'} is saved"
            resumes = "resumes from there" if saved_step else "starts over"
            raise Stopped(
                f"Stopped by {why} after step {step} of {setup.steps}, {saved}. The same command "
                f"(or `dvc repro`) {resumes}.",
                self._interruption.received or SIGNALS[0],
            )
        self.model.stop_training = self.finished

    def _sample(self, sample: Callable[[], str], step: int) -> None:
        """Continue the sample prompt; an error is logged, and the run continues."""
        current().doing(f"the sample after step {step}", SAMPLE_LIMIT)
        self.model.jax_state_sync()
        with self.history.timed("sample"):
            try:
                text = sample()
            except Exception as error:  # a sample only shows the run's progress: none of its errors may end the run
                text = ""
                logger.info(
                    f"No sample after step {step}: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
                )
            self.history.samples.append(Sample(step=step, prompt=self._setup.settings.sample_prompt, text=text))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Show the validation loss in Keras' line, if it was measured after the epoch's last step."""
        held_out = self.history.rows[-1].validation_loss
        if logs is not None and held_out is not None:
            logs["val_loss"] = held_out

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint's arrays into the model and its optimizer, each sharded as its variable."""
        self._state.restore(
            checkpoint,
            batches=checkpoint.step * self._setup.settings.gradient_accumulation,
            within_epoch=self.history.steps % self._setup.steps_per_epoch != 0,
            best=self.history.best_loss is not None,
        )

    def restore_best(self) -> None:
        """Restore the weights of the lowest validation loss, with early stopping."""
        self._state.restore_best()

    def check_finite(self) -> None:
        """Stop if a trained weight is not finite: the last step's loss was computed before it changed them.

        Raises:
            StageError: one is not.
        """
        for variable in self.model.trainable_variables:
            if not _is_finite(whole(variable.value)):
                raise self._diverged(f"{variable.path} has values that are not finite", self.history.steps)

    def _save(self, store: Store) -> None:
        """Copy the state to the host and have it written in the background, after what is still being written."""
        current().doing(f"the checkpoint after step {self.history.steps}", SAVE_LIMIT)
        self.model.jax_state_sync()
        with self.history.timed("checkpoint"):
            # Before anything is copied: the host has room for one copy.
            store.finish()
            pieces = self._state.pieces(gathered=store.writers < current().count)
            store.save(self.history.steps, pieces, self.history.state())

    def wait_for_checkpoint(self) -> int | None:
        """Wait for what is being written, and return the newest step that is kept; None: none is.

        Raises:
            StageError: it had values that are not finite, and was not kept.
        """
        store = self._setup.store
        if store is None:
            return None
        current().doing("the end of the last checkpoint", SAVE_LIMIT)
        with self.history.timed("checkpoint"):
            saved = store.newest_saved()
        self._check_saved()
        return saved

    def _check_saved(self) -> None:
        """Stop if NaN or Inf was found in what was to be saved, which is checked during the next steps."""
        store = self._setup.store
        if store is not None and store.not_finite is not None:
            step, name = store.not_finite
            raise self._diverged(f"{name} has values that are not finite", step)

    def _validate(self) -> None:
        """Measure the validation loss and record it with the step; track the lowest, for early stopping."""
        history, patience = self.history, self._setup.settings.early_stopping
        current().doing(f"the validation after step {history.steps}", VALIDATION_LIMIT)
        self.model.jax_state_sync()
        with history.timed("validation"):
            # `evaluate` counts in the same metrics as the epoch does.
            kept = [whole(variable.value) for variable in self.model.metrics_variables]
            held_out = self._setup.held_out
            loss = self.model.measure(held_out, held_out.tokens)["loss"]
            for variable, value in zip(self.model.metrics_variables, kept, strict=True):
                put(variable, value)
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss}", history.steps)
        history.rows[-1] = history.rows[-1].model_copy(update={"validation_loss": float(loss)})
        if patience is None:
            return
        if history.best_loss is None or loss < history.best_loss:
            history.best_loss, history.waited = float(loss), 0
            self._state.keep_best()
        else:
            history.waited += 1
        if history.waited >= patience:
            history.stopped_early = True
            logger.info(
                f"Stopped after step {history.steps}: the validation loss was not below {history.best_loss:.4f} in the "
                f"last {patience} measurements."
            )

    def _diverged(self, what: str, step: int) -> StageError:
        """Return the error of a run that diverged in a step, counted from 1."""
        epoch, within = divmod(step - 1, self._setup.steps_per_epoch)
        rate = self._setup.rate(step - 1)
        batch = ""
        if self._setup.reviews is not None:
            numbers = np.unique(self._setup.reviews[self.batches.rows(epoch, within)])
            batch = f", reviews={numbers[numbers >= 0].tolist()} (rows of {REVIEWS['train']})"
        return StageError(
            f"Training diverged: {what}. Received: step={step}, learning_rate={rate:.6g}{batch}. No weights were "
            "written. Set a lower finetune.learning_rate, or finetune.clip_norm, or look at these reviews."
        )


@jax.jit
def bit_sums(values: list[jax.Array]) -> jax.Array:
    """Return two sums over the bits of each array, uint32 (arrays, 2), computed on its shards.

    Arrays that differ in a bit have equal sums with a probability of at most 2**-32.
    """

    def sums(value: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(value, f"uint{8 * value.dtype.itemsize}").astype("uint32")
        return jnp.stack([jnp.sum(bits, dtype="uint32"), jnp.sum(bits * bits, dtype="uint32")])

    return jnp.stack([sums(value) for value in values])


def _is_finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array.astype(np.float32, copy=False)).all())
