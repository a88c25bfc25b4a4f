"""What a run's state is: weights, optimizer, metrics and the best weights so far, to checkpoints and back."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import keras
import numpy as np

from stages.core.finetune.pieces import Piece
from stages.core.finetune.resuming import Checkpoint
from stages.core.finetune.shards import HostCopy, begin_copying, host_copy, restored, whole_piece
from stages.core.sharding import hosts
from stages.core.sharding.keras_internals import set_value


class RunState:
    """The variables of a compiled model that training changes, and a copy of the best weights on the host."""

    def __init__(self, model: keras.Model) -> None:
        """Take the model; it has no best weights yet."""
        self._model = model
        self._best: dict[str, HostCopy] | None = None
        self._metrics: list[np.ndarray] | None = None

    def pieces(self, *, gathered: bool) -> list[Piece]:
        """Return copies of what this process is to write: its devices' parts, or on the first all.

        Args:
            gathered: the first process writes all, to a folder of its own.
        """
        values = dict(self._variables())
        if gathered:
            pieces = [piece for name, value in values.items() for piece in whole_piece(name, value)]
            for path, copy in (self._best or {}).items():
                pieces += whole_piece(f"best/{path}", copy.array())
            return pieces
        for name, value in values.items():
            begin_copying(name, value)
        pieces = []
        for name, value in values.items():
            pieces += host_copy(name, value, own_only=True).pieces(name)
        for path, copy in (self._best or {}).items():
            pieces += copy.pieces(f"best/{path}")
        return pieces

    def restore(self, checkpoint: Checkpoint, *, batches: int, within_epoch: bool, best: bool) -> None:
        """Set all variables, one at a time, each sharded as it is.

        Args:
            checkpoint: of a run of this model, on any mesh.
            batches: trained on so far.
            within_epoch: the metrics' sums are the begun epoch's: see `restore_metrics`.
            best: the checkpoint holds the best weights.
        """
        model = self._model
        for name, variable in self._named():
            if not name.startswith("metric/"):
                set_value(variable, restored(checkpoint, name, variable.value))
            elif within_epoch:
                self._metrics = [*(self._metrics or []), hosts.whole(restored(checkpoint, name, variable.value))]
        if best:
            self._best = {}
            for variable in model.trainable_variables:
                value = restored(checkpoint, f"best/{variable.path}", variable.value)
                self._best[variable.path] = host_copy(f"best/{variable.path}", value)
        if model.dropout_step is not None:
            # It counts batches.
            put(model.dropout_step, np.array(batches))

    def restore_metrics(self) -> None:
        """Set the metrics to the sums of the checkpoint, once: Keras resets them when an epoch begins."""
        if self._metrics is not None:
            for variable, value in zip(self._model.metrics_variables, self._metrics, strict=True):
                put(variable, value)
            self._metrics = None

    def keep_best(self) -> None:
        """Copy the trained weights to the host: they are the best so far."""
        variables = self._model.trainable_variables
        self._best = {each.path: host_copy(f"best/{each.path}", each.value) for each in variables}

    def restore_best(self) -> None:
        """Set the trained weights to the best, if any were kept."""
        if self._best is not None:
            for variable in self._model.trainable_variables:
                set_value(variable, self._best[variable.path].array())

    def _named(self) -> Iterator[tuple[str, keras.Variable]]:
        """The variables by their names in a checkpoint."""
        for variable in self._model.trainable_variables:
            yield f"trained/{variable.path}", variable
        for index, variable in enumerate(self._model.optimizer.variables):
            yield f"optimizer/{index}", variable
        for index, variable in enumerate(self._model.metrics_variables):
            yield f"metric/{index}", variable

    def _variables(self) -> Iterator[tuple[str, jax.Array]]:
        for name, variable in self._named():
            yield name, variable.value


def put(variable: keras.Variable, value: np.ndarray) -> None:
    """Set a variable's value, sharded as the variable is."""
    set_value(variable, hosts.put(np.asarray(value, variable.dtype), variable.value.sharding))
