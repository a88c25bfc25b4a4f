"""Dispatches steps ahead: a step's numbers are read while later steps run.

Purpose: Keras passes each step's loss to its callbacks, and reading it waits for the device, which then idles until the
host dispatches the next step. On a chip with steps of 5 ms that is a good part of the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import keras

from stages.core.finetune.callback import TrainingCallback

# Steps in flight beside the one that is read. A simulated device works on the host's own cores: it gains nothing.
AHEAD = {"cpu": 0}
AHEAD_ELSEWHERE = 2


class LateLogs(keras.callbacks.CallbackList):
    """Keras' list of callbacks, called at a step's end once its numbers are there, at most a few steps later.

    The order stays: once for each step, and before the epoch's end. Where the training callback has something to do
    after a step, the calls for all steps up to it come first.
    """

    def __init__(self, training: TrainingCallback, **options: Any) -> None:
        """Take a run's callback; the options are those of Keras' list."""
        super().__init__([training], add_history=True, **options)
        self._training = training
        self._ahead = AHEAD.get(jax.default_backend(), AHEAD_ELSEWHERE)
        self._late: deque[tuple[int, Mapping[str, jax.Array]]] = deque()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, jax.Array] | None = None) -> None:
        """Tell of the oldest step in flight, if enough are; of all if something is due."""
        for value in (logs or {}).values():
            value.copy_to_host_async()
        self._late.append((batch, logs or {}))
        self._tell(0 if self._training.is_due(self._training.begun) else self._ahead)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Tell of all steps, then of the epoch."""
        self._tell(0)
        super().on_epoch_end(epoch, logs)

    def _tell(self, left: int) -> None:
        while len(self._late) > left:
            super().on_train_batch_end(*self._late.popleft())
