"""Chooses the codes of the matrices that an int4 base holds in 4 bits, block by block, on training sequences.

Reads: the preset's weights and the sequences. The 4-bit layers of a block have two inputs: the hidden states before
attention, and those before the feed-forward layers. The second moment of each decides the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stages.core.common.errors import StageError
from stages.core.common.progress import ProgressLog
from stages.core.load.chosen_codes import Codes, write_block
from stages.core.load.quantizing import GROUP, in_groups, values_of_groups
from stages.core.load.variants import Preset
from stages.core.model.tensor_parallel import Projections
from stages.core.presets.formats import format_of
from stages.core.quantize import by_blocks, gptq
from stages.core.records.forms import four_bits_of
from stages.core.records.quantize import QuantizedBase
from stages.core.sharding.keras_internals import kernel_of


@dataclass(frozen=True)
class Errors:
    """Squared errors of a layer's outputs as a fraction of their squares, with nearest and with chosen codes."""

    nearest: float
    chosen: float


class _Watched(Projections):
    """Applies layers, and keeps the second moments of the inputs of 4-bit layers."""

    def __init__(self, names: tuple[str, ...], counted: np.ndarray) -> None:
        """Take the names of the 4-bit layers, and which tokens are no padding, bool (batch, length)."""
        super().__init__()
        self._names, self._counted = names, counted[..., None]
        self.found: list[tuple[list[Any], np.ndarray]] = []

    def columns(self, layers: Any, x: jax.Array, dropout: Any = None) -> list[jax.Array]:
        """Apply several layers to the same hidden states."""
        if of_codes := [layer for layer in layers if layer.name in self._names and _fits(kernel_of(layer).shape)]:
            rows = jnp.where(self._counted, x, 0).reshape(-1, x.shape[-1])
            self.found.append((of_codes, np.asarray(jnp.dot(rows.T, rows, precision=jax.lax.Precision.HIGHEST))))
        return super().columns(layers, x, dropout)


def choose(
    preset: Preset, dtype: str, sequences: Mapping[str, np.ndarray], folder: Path
) -> tuple[QuantizedBase, dict[str, Errors]]:
    """Choose the codes of all blocks and write them, a file for each block.

    Args:
        preset: from `open_preset`.
        dtype: a `load.dtype` with layers of 4 bits.
        sequences: `token_ids` and `segment_ids`, int32 (sequences, length); a segment of 0 is padding.
        folder: for the files.

    Returns:
        The index of the files, and the errors of each layer by its kernel's path.

    Raises:
        StageError: activations are not finite, or the numbers of a weight have no finite range.
        OSError: the disk is full, or a file cannot be written.
    """
    watched = _Watched(four_bits_of(dtype), sequences["segment_ids"] > 0)
    errors: dict[str, Errors] = {}
    files: dict[str, str] = {}
    blocks = preset.architecture.config["num_layers"]
    progress = ProgressLog("Block", total=blocks)

    def after_block(block: Any) -> None:
        codes: dict[str, Codes] = {}
        for layers, moment in watched.found:
            if not np.isfinite(moment).all():
                raise StageError(
                    f"Activations must be finite to choose codes. Received: a NaN or an infinity in {block.name}\n"
                    "The checkpoint is damaged, or its training diverged: take another one."
                )
            upper = gptq.factor(moment)
            for layer in layers:
                path, kernel = kernel_of(layer).path, np.asarray(kernel_of(layer).value)
                matrix = _matrix(kernel)
                chosen = Codes(*gptq.rounded(matrix, upper))
                codes[path] = Codes(*(_kernel(each, kernel.shape) for each in chosen))
                both = (values_of_groups(*each) for each in (in_groups(matrix), chosen))
                errors[path] = Errors(*(gptq.output_error(matrix, each, moment) for each in both))
        watched.found.clear()
        if codes:
            path = folder / f"{block.name}.safetensors"
            files[path.name] = write_block(path, codes)
        progress.show(len(files), f"{len(errors)} matrices")

    with format_of(preset.manifest.format).open_weights(preset.folder, preset.architecture) as weights:
        by_blocks.hidden_states(
            preset.architecture,
            weights,
            sequences["token_ids"],
            sequences["segment_ids"],
            projections=watched,
            after_block=after_block,
        )
    return QuantizedBase(base=preset.fingerprint, dtype=dtype, files=files, kernels=tuple(errors)), errors


def _fits(shape: tuple[int, ...]) -> bool:
    """Return whether groups divide a kernel's inputs, and two codes may share a byte."""
    return shape[-2] % GROUP == 0 and shape[-1] % 2 == 0


def _matrix(kernel: np.ndarray) -> np.ndarray:
    """Return a kernel (inputs, outputs), or (heads, inputs, head size) with the heads' outputs side by side."""
    return kernel if kernel.ndim == 2 else np.ascontiguousarray(np.moveaxis(kernel, 0, 1)).reshape(kernel.shape[1], -1)


def _kernel(matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a matrix (rows, outputs), of inputs or groups of them, in the form of the kernel of this shape."""
    if len(shape) == 2:
        return matrix
    heads, _, head = shape
    return np.ascontiguousarray(np.moveaxis(matrix.reshape(len(matrix), heads, head), 1, 0))
