"""Rounds a matrix to 4-bit codes so that rounding errors cancel in the layer's outputs (GPTQ).

Purpose: rounding each weight to the nearest code ignores that some inputs are large and many are correlated. Here the
weights of a channel are rounded one after the other, and those not yet rounded are adjusted to cancel the change of the
output as far as possible. Source: https://arxiv.org/abs/2210.17323, algorithm 1.

    H = X^T X over the inputs X (tokens, inputs),   U upper triangular with U^T U = (H + damping)^-1
    for each input i, in order:  e_i = (w_i - rounded w_i) / U_ii,   w_j <- w_j - U_ij e_i  for all j > i
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from stages.core.load.quantizing import GROUP, in_groups, nearest

DAMPING = 0.01
"""Added to the diagonal of H, as a fraction of its mean, so that H can be inverted; the source uses the same."""


def factor(moment: np.ndarray) -> np.ndarray:
    """Return U of the inputs' second moment H, float32 (inputs, inputs)."""
    wide = moment.astype(np.float64)
    mean = float(np.mean(np.diag(wide))) or 1.0
    wide += np.eye(len(wide)) * DAMPING * mean
    return np.linalg.cholesky(np.linalg.inv(wide)).T.astype(np.float32)


def rounded(values: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes of 4 bits, and the scale and offset of each group, as `quantizing.in_groups` does.

    A group's scale and offset are fitted to its weights after the adjustments for the groups before it.

    Args:
        values: float32 (inputs, outputs).
        upper: from `factor`.
    """
    left = values.copy()
    codes, scales, offsets = [], [], []
    for start in range(0, len(values), GROUP):
        _, scale, offset = in_groups(np.ascontiguousarray(left[start : start + GROUP]))
        by = scale[0].astype(np.float32), offset[0].astype(np.float32)
        errors = np.empty((GROUP, values.shape[1]), np.float32)
        own = np.empty((GROUP, values.shape[1]), ml_dtypes.int4)
        for row in range(GROUP):
            place = start + row
            numbers = nearest(left[place], *by)
            own[row] = numbers.astype(ml_dtypes.int4)
            errors[row] = (left[place] - (numbers * by[0] + by[1])) / upper[place, place]
            left[place + 1 : start + GROUP] -= np.outer(upper[place, place + 1 : start + GROUP], errors[row])
        left[start + GROUP :] -= upper[start : start + GROUP, start + GROUP :].T @ errors
        codes.append(own)
        scales.append(scale)
        offsets.append(offset)
    return np.concatenate(codes), np.concatenate(scales), np.concatenate(offsets)


def output_error(values: np.ndarray, rounded_values: np.ndarray, moment: np.ndarray) -> float:
    """Return the squared error of a layer's outputs as a fraction of the outputs' squares, over the inputs of H.

    Args:
        values: float32 (inputs, outputs).
        rounded_values: those of the codes.
        moment: H.
    """

    def squares(matrix: np.ndarray) -> float:
        return float(np.sum(matrix * (moment @ matrix), dtype=np.float64))

    return squares(values - rounded_values) / (squares(values) or 1.0)
