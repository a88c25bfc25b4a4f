"""The training curve: what happened at each step, kept by a Keras callback and written as CSV.

Writes: `data/plots/finetune.csv`.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from stages.core.files import atomic_path

COLUMNS = ("step", "epoch", "loss", "accuracy", "tokens_per_second", "learning_rate", "validation_loss")


class Curve(keras.callbacks.Callback):
    """Keeps what happened at each step: the rows of `data/plots/finetune.csv`, and how long steps took."""

    def __init__(self, tokens_per_step: int, stop_after: int | None) -> None:
        """Start empty.

        Args:
            tokens_per_step: positions a step computes, padding of the batch left out.
            stop_after: stop the run after so many steps in all; None for no limit.
        """
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self._tokens = tokens_per_step
        self._stop_after = stop_after
        self._epoch = 0
        self._began = 0.0

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Note the epoch."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Keep the step; reading the loss waits until it is computed, so the clock covers all of it."""
        loss, accuracy = float(logs["batch_loss"]), float(logs["batch_accuracy"])
        self.seconds.append(time.perf_counter() - self._began)
        self.rows.append(
            {
                "step": len(self.rows) + 1,
                "epoch": self._epoch + 1,
                "loss": loss,
                "accuracy": accuracy,
                "tokens_per_second": self._tokens / self.seconds[-1],
                "learning_rate": float(self.model.optimizer.learning_rate),
                "validation_loss": None,
            }
        )
        if self._stop_after is not None and len(self.rows) >= self._stop_after:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Put the validation loss beside the epoch's last step."""
        if logs and "val_loss" in logs:
            self.rows[-1]["validation_loss"] = float(logs["val_loss"])


def write_curve(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as CSV, one a step."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )
