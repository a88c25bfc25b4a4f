"""Sequences of tokens as batches for Keras: in a seeded order, padded to what the mesh divides.

Reads: `data/tokens/*.npz`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras
import numpy as np

from stages.core.sharding.hosts import held_rows
from stages.core.sharding.mesh import MeshShape

INPUTS = ("token_ids", "target_ids", "weights", "segment_ids")


def padded_size(batch_size: int, mesh: MeshShape) -> int:
    """Return the sequences of a batch once it is padded to what the mesh's batch axis divides."""
    return math.ceil(batch_size / mesh.sizes["batch"]) * mesh.sizes["batch"]


class Batches(keras.utils.PyDataset):
    """Sequences in steps of one shape: the last is padded with zero-weight sequences, none is dropped.

    A step is one batch or, with `accumulation`, a group of batches, by whose summed gradients the weights change once.
    Groups end with the epoch, as batches do: k batches of b are the same sequences as one batch of k x b.
    """

    def __init__(
        self,
        sequences: Mapping[str, np.ndarray],
        batch_size: int,
        mesh: MeshShape,
        *,
        seed: int | None = None,
        first_step: int = 0,
        end_step: int | None = None,
        accumulation: int = 1,
    ) -> None:
        """Take the sequences; an epoch's order is made when it is first asked for.

        Args:
            sequences: (sequences, length) arrays as `tokenize` writes them; without `segment_ids` each is one segment.
            batch_size: sequences per batch, at most as many as there are.
            mesh: the batch is padded to a multiple of its batch axis.
            seed: shuffle each epoch by (seed, epoch); None keeps the order.
            first_step: start each epoch at this step, for a run that resumes within one.
            end_step: end each epoch before this step, for a run that ends within one; None: at its end.
            accumulation: batches per step, at least 1.
        """
        super().__init__()
        self._sequences = {name: sequences[name] for name in INPUTS if name in sequences}
        if "segment_ids" not in self._sequences:
            # One segment; padding follows it and is never a target, so it needs no segment of its own.
            self._sequences["segment_ids"] = np.ones_like(sequences["token_ids"])
        self._count = len(self._sequences["token_ids"])
        self.batch_size = min(batch_size, self._count)
        self.accumulation = accumulation
        self._padded_size = padded_size(self.batch_size, mesh)
        self._held = held_rows(self._padded_size, mesh)
        self._seed = seed
        self._order: tuple[int, np.ndarray] | None = None
        self._first_step = first_step
        self._end_step = self.steps_per_epoch if end_step is None else end_step
        # Set by the callback at the start of each epoch: Keras also calls `on_epoch_end` before the first.
        self.epoch = 0

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch."""
        return math.ceil(self._count / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def positions_per_step(self) -> int:
        """Positions computed in a step, including those without a target and padding."""
        return self._padded_size * self.accumulation * self._sequences["token_ids"].shape[1]

    @property
    def tokens(self) -> int:
        """Tokens trained on or measured in an epoch: positions with a weight."""
        return int(np.count_nonzero(self._sequences["weights"] > 0))

    def __len__(self) -> int:
        """Steps to do in this epoch."""
        return self._end_step - self._first_step

    def rows(self, epoch: int, step: int) -> np.ndarray:
        """Return the numbers of the sequences of a step; steps count from the epoch's beginning."""
        if self._order is None or self._order[0] != epoch:
            shuffled = None if self._seed is None else np.random.default_rng([self._seed, epoch])
            self._order = (epoch, np.arange(self._count) if shuffled is None else shuffled.permutation(self._count))
        size = self.batch_size * self.accumulation
        return self._order[1][step * size : (step + 1) * size]

    def tokens_of(self, epoch: int, step: int) -> int:
        """Return how many tokens a step trains on; steps count from the epoch's beginning."""
        return int(np.count_nonzero(self._sequences["weights"][self.rows(epoch, step)] > 0))

    def __getitem__(self, step: int) -> tuple[dict[str, np.ndarray]]:
        """Return a step's arrays; steps count from `first_step`.

        They are (batch, length), or with accumulation (batch, batches, length): the first axis is the one that Keras
        splits over the devices. A batch has its full size, and a group all its batches. Of several processes each has
        the rows of its own devices: Keras puts them together.
        """
        rows = self.rows(self.epoch, self._first_step + step)
        return ({name: self._laid_out(values[rows]) for name, values in self._sequences.items()},)

    def _laid_out(self, values: np.ndarray) -> np.ndarray:
        length = values.shape[1]
        group = np.zeros((self.accumulation, self._padded_size, length), values.dtype)
        full = np.zeros((self.accumulation * self.batch_size, length), values.dtype)
        full[: len(values)] = values
        group[:, : self.batch_size] = full.reshape(self.accumulation, self.batch_size, length)
        held = group[:, self._held]
        return held[0] if self.accumulation == 1 else np.ascontiguousarray(held.swapaxes(0, 1))
