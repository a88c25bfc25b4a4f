"""Int8 codes of weights, with a scale for each output channel: half of bfloat16's memory, for a base that is frozen.

Purpose: what `load.dtype` says of int8, which weights become codes, and the codes themselves.

    code = round(w / scale), from -127 to 127,    scale = max |w| / 127 over what goes into the channel

Symmetric and by channel, as in https://arxiv.org/abs/2004.09602: the scale then leaves the matrix product, (x W) = (x
code) scale, and the compiler converts the codes within the product. Scales that vary along the product's own sum would
make it write the whole matrix in the compute dtype first.
"""

from __future__ import annotations

from typing import NamedTuple

import keras
import numpy as np

from stages.core.load.lora_kernels import PROJECTIONS
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


class Form(NamedTuple):
    """A `load.dtype` with codes.

    Attributes:
        policy: the Keras dtype policy of all else, and of the products.
        table: whether the token table becomes codes too, with a scale for each row.
    """

    policy: str
    table: bool


FORMS = {
    "int8": Form("bfloat16", table=False),
    "int8_table": Form("bfloat16", table=True),
    "int8_float32": Form("float32", table=False),
    "int8_table_float32": Form("float32", table=True),
}
"""By `load.dtype`; any other is a Keras dtype policy, without codes."""


def policy_of(dtype: str) -> str:
    """Return the Keras dtype policy of a `load.dtype`: of all that does not become codes."""
    return FORMS[dtype].policy if dtype in FORMS else dtype


def declare(backbone: keras.Model, form: Form) -> None:
    """Make the declared matrices of the blocks, and by choice the token table, weights of codes with their scales.

    Norms stay floats: they are a few thousand numbers, and no products; so do routers, by whose last bits experts are
    chosen.
    """
    with declared_only():
        if form.table:
            table = embedding_table(backbone)
            declare_codes(backbone.token_embedding, table, (table.shape[0], 1))
            if (of_blocks := layer_table(backbone)) is not None:
                declare_codes(of_blocks, table_within(of_blocks), (table.shape[0], 1))
        for layer in layers_within(backbone):
            if layer.name in PROJECTIONS and layer.weights:
                operands, result = equation_of(layer).split("->")
                axes = operands.split(",")[1]
                kernel = kernel_of(layer)
                shape = zip(axes, kernel.shape, strict=True)
                declare_codes(layer, kernel, tuple(size if axis in result else 1 for axis, size in shape))
            if layer.name == "moe_expert_bank":
                for matrix in (layer.gate_proj, layer.up_proj, layer.down_proj):
                    experts, _, outputs = matrix.shape
                    declare_codes(layer, matrix, (experts, 1, outputs))


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
