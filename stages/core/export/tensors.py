"""The tuned model's weights by Hugging Face's names, one at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from stages.core.export.tuned import MergedWeights, as_matrix
from stages.core.presets.architecture import Architecture
from stages.core.presets.weight_table import weight_table

PREFIX = "model."
"""What the names of a text model's tensors begin with."""


def hugging_face_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by its name, in the order in which `hugging_face_tensors` yields them."""
    return {PREFIX + each.hugging_face: each.matrix_shape for each in weight_table(architecture).values()}


def hugging_face_tensors(weights: MergedWeights, dtype: Any = np.float32) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor of the tuned model with its name, as a Hugging Face folder of Gemma has them.

    Linear layers are matrices (outputs, inputs) with heads one after the other, norms are scales without the one that
    Gemma adds to them, and there is no language head, which is the table of embeddings. Only the tensor that was
    yielded last is in memory, if the caller lets go of the one before.

    Args:
        weights: from `Tuned.open_merged()`.
        dtype: of the tensors.

    Example:
        >>> with tuned.open_merged() as weights:
        ...     for name, tensor in hugging_face_tensors(weights):
        ...         print(name, tensor.shape)  # model.layers.0.self_attn.q_proj.weight (1024, 640)
    """
    for name, group in itertools.groupby(weights.table.items(), lambda row: row[1].hugging_face):
        # Of a block's experts two weights are one tensor.
        tensor: np.ndarray | None = None
        for path, weight in group:
            tensor = as_matrix(weight, functools.partial(weights.read, path), dtype, tensor)
        if tensor is not None:
            yield PREFIX + name, tensor
        del tensor
