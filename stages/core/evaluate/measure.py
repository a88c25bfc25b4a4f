"""Measuring a model on whole held-out sequences, each from its own BOS.

Purpose: a metric that depends on the model and the text alone. Sequences are padded to a few lengths (buckets) and
batched by length; neither these, nor the mesh, nor how training sequences are cut and packed changes it beyond float32
rounding.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable

import numpy as np

from stages.core.common.errors import StageError
from stages.core.evaluate.review_losses import ReviewLosses
from stages.core.sharding.mesh import MeshShape
from stages.core.tokenize.batches import Batches
from stages.core.tokenize.held_out import HeldOut

logger = logging.getLogger(__name__)

# Each length is one more compilation; a bucket's length is a multiple of this, which the usual meshes divide.
MOST_BUCKETS = 4
MULTIPLE = 64

# From batches of one length to each target's loss (nats) and whether it was the most likely token: (sequences, length).
Model = Callable[["Batches"], tuple[np.ndarray, np.ndarray]]


def measure(model: Model, sequences: HeldOut, mesh: MeshShape, *, max_length: int, batch_tokens: int) -> ReviewLosses:
    """Measure every target of every sequence, up to a length.

    Args:
        model: such as `CausalModel.token_losses`.
        sequences: from `held_out.read_held_out`.
        mesh: a batch's sequences are a multiple of its batch axis.
        max_length: a longer sequence is measured on its first `max_length` inputs; the targets after them are counted.
        batch_tokens: positions per batch; at least one sequence per row of the batch axis is taken.

    Raises:
        StageError: there is no target, or not every target was measured.
    """
    ids, is_target, offsets = (sequences[name] for name in ("token_ids", "is_target", "offsets"))
    # Inputs are all tokens but the last, targets all but the first.
    starts, sizes = offsets[:-1], np.minimum(np.maximum(np.diff(offsets) - 1, 0), max_length)
    pieces = [slice(start, start + size + 1) for start, size in zip(starts, sizes, strict=True)]
    wanted = np.array([is_target[piece][1:].sum() for piece in pieces])
    every = np.array([part.sum() for part in np.split(is_target, offsets[1:-1])])
    if not wanted.sum():
        raise StageError(
            f"The held-out reviews must have at least one target within {max_length} tokens. Received: {len(sizes)} "
            "reviews, none. Set a larger evaluate.max_length, or give prepare other held-out reviews."
        )
    measured = {
        name: np.zeros(len(sizes), kind) for name, kind in (("targets", int), ("loss", float), ("correct", int))
    }
    numbers = np.flatnonzero(wanted)
    lengths = np.array(bucket_lengths(sizes[numbers]))
    bucket = np.searchsorted(lengths, sizes[numbers])
    for place, length in enumerate(lengths.tolist()):
        rows = numbers[bucket == place]
        inside = np.arange(length) < sizes[rows][:, None]
        at = np.where(inside, starts[rows][:, None] + np.arange(length), 0)
        # Padding follows the sequence, so that nothing attends to it.
        arrays = {"token_ids": np.where(inside, ids[at], 0), "target_ids": np.where(inside, ids[at + inside], 0)}
        weights = inside & is_target[at + inside]
        batches = Batches(
            {**arrays, "weights": weights.astype(np.float32)},
            batch_rows(len(rows), max(1, batch_tokens // length), mesh.sizes["batch"]),
            mesh,
        )
        logger.info(f"Measuring {len(rows)} of {len(numbers)} sequences, padded to {length} tokens ...")
        loss, correct = model(batches)
        # As many as were returned: missing ones are noticed below.
        weights = weights[: len(loss)]
        loss = np.where(weights, loss[: len(rows)], 0.0)
        for name, values in (("targets", weights), ("loss", loss), ("correct", weights & correct[: len(rows)])):
            measured[name][rows[: len(loss)]] = values.sum(axis=1, dtype=measured[name].dtype)
    counted = int(measured["targets"].sum())
    if counted != wanted.sum():
        raise StageError(
            f"Every target must be measured: expected {wanted.sum()}. Received: targets={counted}. Look for a callback "
            "or an environment variable that shortens Keras' predict."
        )
    digests = [_digest(ids[piece], is_target[piece]) for piece in pieces]
    return ReviewLosses(review=np.arange(len(sizes)), sequence=np.array(digests), cut=every - wanted, **measured)


def bucket_lengths(sizes: np.ndarray, most: int = MOST_BUCKETS, multiple: int = MULTIPLE) -> list[int]:
    """Return the lengths to pad sequences to, ascending: of all choices the one with the fewest positions.

    Args:
        sizes: positions of each sequence, at least one sequence.
        most: lengths at most.
        multiple: of which each length is one.
    """
    lengths, counts = np.unique(-(-sizes // multiple) * multiple, return_counts=True)
    before = np.cumsum([0, *counts]).tolist()
    # For the sequences of the first lengths, none to all of them: the fewest positions, and the buckets they take.
    best: list[tuple[float, tuple[int, ...]]] = [(0, ()), *((math.inf, ()) for _ in lengths)]
    for _ in range(most):
        best = [
            min(
                [best[end]]
                + [
                    (best[begin][0] + (before[end] - before[begin]) * length, (*best[begin][1], length))
                    for begin in range(end)
                    for length in [int(lengths[end - 1])]
                ]
            )
            for end in range(len(best))
        ]
    return list(best[-1][1])


def batch_rows(count: int, most: int, multiple: int) -> int:
    """Return sequences per batch: at most `most` but at least a multiple, and as equal as can be, so few are empty.

    Example:
        >>> batch_rows(9, 8, 1)
        5
    """
    most = math.ceil(most / multiple) * multiple
    return math.ceil(math.ceil(count / math.ceil(count / most)) / multiple) * multiple


def _digest(token_ids: np.ndarray, is_target: np.ndarray) -> str:
    """Return 16 hexadecimal digits for what is measured of a sequence."""
    content = token_ids.astype("<i4").tobytes() + np.packbits(is_target).tobytes()
    return hashlib.sha256(content).hexdigest()[:16]
