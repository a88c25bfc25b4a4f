"""Codes of weights, of 8 bits with a scale for each output channel, or of 4 bits by groups, for a base that is frozen.

Purpose: which weights become codes of which kind, and the codes themselves.

    8 bits: code = round(w / scale), from -127 to 127,           scale = max |w| / 127 over what goes into the channel
    4 bits: code = round((w - offset) / scale), from -8 to 7,    of each 32 numbers that follow each other in a channel

The first is symmetric and by channel, as in https://arxiv.org/abs/2004.09602: the scale then leaves the matrix product,
(x W) = (x code) scale, and the compiler converts the codes within the product. Of 4 bits a channel's numbers need more
than one scale, and an offset; both are bfloat16, a bit a number.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import ml_dtypes
import numpy as np

from stages.core.common.errors import StageError
from stages.core.load.lora_kernels import PROJECTIONS
from stages.core.records.forms import Form
from stages.core.sharding.keras_internals import (
    declare_codes,
    declared_only,
    embedding_table,
    equation_of,
    kernel_of,
    layer_table,
    layers_within,
    table_within,
)

LARGEST = 127
# Numbers that are divided and rounded at a time, so that beside a weight and its codes there is no third copy.
PIECE = 1 << 22
# Numbers of a channel with one scale and one offset, where codes have 4 bits.
GROUP = 32
# How often its scale and offset are fitted to its codes.
FITS = 3
# Numbers that a thread makes codes of at a time: their temporaries still fit in a core's cache.
CACHED = 1 << 17


def declare(backbone: keras.Model, form: Form) -> None:
    """Make the declared matrices of the blocks, and by choice the token table, weights of codes with their scales.

    Norms stay floats: they are a few thousand numbers, and no products; so do routers, by whose last bits experts are
    chosen.
    """
    with declared_only():
        if form.table:
            table = embedding_table(backbone)
            _by_channel(backbone.token_embedding, table, (table.shape[0], 1))
            if (of_blocks := layer_table(backbone)) is not None:
                _by_channel(of_blocks, table_within(of_blocks), (table.shape[0], 1))
        for layer in layers_within(backbone):
            if layer.name in PROJECTIONS and layer.weights:
                operands, result = equation_of(layer).split("->")
                kernel = kernel_of(layer)
                shape = zip(operands.split(",")[1], kernel.shape, strict=True)
                channels = tuple(size if axis in result else 1 for axis, size in shape)
                _declare(layer, layer.name, kernel, channels, form)
            if layer.name == "moe_expert_bank":
                for matrix in (layer.gate_proj, layer.up_proj, layer.down_proj):
                    experts, _, outputs = matrix.shape
                    _declare(layer, matrix.name, matrix, (experts, 1, outputs), form)


def _declare(layer: Any, name: str, matrix: keras.Variable, channels: tuple[int, ...], form: Form) -> None:
    """Make a matrix one of codes: of 4 bits where the form says so and groups divide what its product sums over."""
    *outer, summed, outputs = matrix.shape
    if name in form.four_bits and summed % GROUP == 0:
        beside = {"scale": "bfloat16", "offset": "bfloat16"}
        declare_codes(layer, matrix, "int4", (*outer, summed // GROUP, outputs), beside)
    else:
        _by_channel(layer, matrix, channels)


def _by_channel(layer: Any, variable: keras.Variable, channels: tuple[int, ...]) -> None:
    """Make a weight one of codes of 8 bits."""
    declare_codes(layer, variable, "int8", channels, {"scale": "float32"})


def largest(values: np.ndarray, scale_shape: tuple[int, ...]) -> np.ndarray:
    """Return the largest absolute value of each channel: float32, with ones where the scales have them.

    Args:
        values: float32, a weight or a part of one.
        scale_shape: of the whole weight's scales.
    """
    axes = tuple(axis for axis, size in enumerate(scale_shape) if size == 1)
    return np.maximum(values.max(axis=axes, keepdims=True), -values.min(axis=axes, keepdims=True))


def codes(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the int8 codes of a weight, or a part of one, by the scales of its channels.

    Args:
        values: float32.
        scales: float32, of the same number of dimensions; 0 for a channel of zeros.
    """
    found = np.empty(values.shape, np.int8)
    divisors = np.where(scales > 0, scales, np.float32(1))
    rows = max(1, PIECE // max(1, values[:1].size))
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        by = divisors if len(divisors) == 1 else divisors[part]
        # A scale that underflows would give codes beyond the range.
        found[part] = np.clip(np.rint(values[part] / by), -LARGEST, LARGEST)
    return found


def scales_of(largest: np.ndarray) -> np.ndarray:
    """Return the scales of channels, float32, from the largest absolute value of each."""
    return largest / np.float32(LARGEST)


def in_groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes of 4 bits, and the scale and offset of each group.

    Args:
        values: float32 (..., inputs, outputs), a weight or a part of one that divides no group.

    Returns:
        int4 of the same shape; bfloat16 (..., inputs / 32, outputs), twice.

    Raises:
        StageError: numbers are so large that the span of a group is not finite.
    """
    groups = values.reshape(-1, GROUP, values.shape[-1])
    codes = np.empty(groups.shape, ml_dtypes.int4)
    scale, offset = (np.empty((len(groups), 1, groups.shape[-1]), ml_dtypes.bfloat16) for _ in range(2))
    step = max(1, CACHED // max(1, groups[:1].size))

    def piece(start: int) -> None:
        part = slice(start, start + step)
        with np.errstate(over="ignore", invalid="ignore"):
            codes[part], scale[part], offset[part] = _fitted(groups[part])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(piece, range(0, len(groups), step)))
    if not (np.isfinite(scale.astype(np.float32)).all() and np.isfinite(offset.astype(np.float32)).all()):
        raise StageError(
            "The numbers of a weight that is held in 4 bits must have a finite range in each group. Received: "
            f"numbers up to {np.abs(values).max():.2g}. Set load.dtype: int8, or float32."
        )
    beside = (*values.shape[:-2], values.shape[-2] // GROUP, values.shape[-1])
    return codes.reshape(values.shape), scale.reshape(beside), offset.reshape(beside)


def _fitted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, scales and offsets of groups (groups, 32, outputs).

    At first the codes span the range of a group. Then scale and offset are fitted to the codes by least squares, and
    the codes are rounded anew, some times: a seventh less squared error.
    """
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    scale = (high - low) / np.float32(15)
    # Half a step above the middle of the range is the code 0: there are eight below, and seven above.
    offset = low / 2 + high / 2 + scale / 2
    mean = values.mean(axis=1, keepdims=True)
    for _ in range(FITS):
        codes = nearest(values, scale, offset)
        middle = codes.mean(axis=1, keepdims=True)
        apart = np.square(codes).mean(axis=1, keepdims=True) - np.square(middle)
        together = (codes * values).mean(axis=1, keepdims=True) - middle * mean
        scale = np.divide(together, apart, out=scale, where=apart > 0)
        offset = mean - scale * middle
    scale, offset = scale.astype(ml_dtypes.bfloat16), offset.astype(ml_dtypes.bfloat16)
    codes = nearest(values, scale.astype(np.float32), offset.astype(np.float32))
    return codes.astype(ml_dtypes.int4), scale, offset


def values_of_groups(codes: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return the numbers that codes of 4 bits stand for, float32 (..., inputs, outputs), see `in_groups`."""
    by, plus = (np.repeat(each.astype(np.float32), GROUP, axis=-2) for each in (scale, offset))
    return codes.astype(np.float32) * by + plus


def nearest(values: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return the codes nearest to values by scales and offsets of their shape, float32 from -8 to 7."""
    codes = (values - offset) / np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.rint(codes, out=codes), -8, 7, out=codes)
