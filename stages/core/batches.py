"""Windows of tokens as batches for Keras: in a seeded order, padded to what the mesh divides.

Reads: `data/tokens/*.npz`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras
import numpy as np

from stages.core.errors import StageError
from stages.core.mesh import MeshShape
from stages.core.paths import TOKENS, Paths

INPUTS = ("token_ids", "target_ids", "weights", "segment_ids")


def read_windows(paths: Paths, split: str) -> dict[str, np.ndarray]:
    """Return the arrays of a split, as `tokenize` wrote them.

    Raises:
        StageError: there is no window in it.
    """
    with np.load(paths.read(TOKENS[split])) as file:
        windows = {name: file[name] for name in file.files}
    if not len(windows["token_ids"]):
        raise StageError(f"{TOKENS[split]} must hold at least one window. Received: none. Give prepare more reviews.")
    return windows


def padded_size(batch_size: int, mesh: MeshShape) -> int:
    """Return the windows of a batch once it is padded to what the mesh's batch axis divides."""
    return math.ceil(batch_size / mesh.sizes["batch"]) * mesh.sizes["batch"]


class Batches(keras.utils.PyDataset):
    """Windows in batches of one size: what is missing in the last is padded with weight zero, nothing is dropped."""

    def __init__(
        self,
        windows: Mapping[str, np.ndarray],
        batch_size: int,
        mesh: MeshShape,
        *,
        seed: int | None = None,
        epochs: int = 1,
        first_step: int = 0,
        end_step: int | None = None,
    ) -> None:
        """Prepare the order of all epochs.

        Args:
            windows: (windows, length) arrays as `tokenize` writes them; without `segment_ids` a window is one segment.
            batch_size: windows a step.
            mesh: the batch is padded to a multiple of its batch axis.
            seed: shuffle each epoch by (seed, epoch); None keeps the order.
            epochs: passes over the windows.
            first_step: start each epoch at this step, for a run that goes on within one.
            end_step: end each epoch before this step, for a run that ends within one; None: at its end.
        """
        super().__init__()
        self._windows = {name: windows[name] for name in INPUTS if name in windows}
        if "segment_ids" not in self._windows:
            # One segment; padding follows it and is never a target, so it needs no segment of its own.
            self._windows["segment_ids"] = np.ones_like(windows["token_ids"])
        self._batch_size = batch_size
        self._padded_size = padded_size(batch_size, mesh)
        count = len(self._windows["token_ids"])
        self._orders = [
            np.arange(count) if seed is None else np.random.default_rng([seed, epoch]).permutation(count)
            for epoch in range(epochs)
        ]
        self._first_step = first_step
        self._end_step = self.steps_per_epoch if end_step is None else end_step
        # Set when an epoch begins, by who knows its number: Keras also calls `on_epoch_end` before the first.
        self.epoch = 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch."""
        return math.ceil(len(self._orders[0]) / self._batch_size)

    def __len__(self) -> int:
        """Steps to do in this epoch."""
        return self._end_step - self._first_step

    def rows(self, epoch: int, step: int) -> np.ndarray:
        """Return the numbers of the windows in a batch; steps count from the epoch's beginning."""
        return self._orders[epoch][step * self._batch_size : (step + 1) * self._batch_size]

    def __getitem__(self, step: int) -> tuple[dict[str, np.ndarray]]:
        """Return a batch, padded to its full size; steps count from `first_step`."""
        rows = self.rows(self.epoch, self._first_step + step)
        missing = self._padded_size - len(rows)
        batch = {
            name: np.concatenate([values[rows], np.zeros((missing, *values.shape[1:]), values.dtype)])
            for name, values in self._windows.items()
        }
        return (batch,)
