"""The tuned variant on disk: what was trained, read weight by weight, and the weights with the adapter merged in.

Purpose: no copy of the model in memory. A merged weight is made when it is asked for, in pieces of its first axis, so
that whoever writes a file of any size holds one weight of it.
Reads: `models/tuned/model.json`, the tuned weights next to it, the preset's manifest and files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from stages.core.common.errors import StageError
from stages.core.common.paths import Paths, variant_folder
from stages.core.load import adapter, variants
from stages.core.presets.formats import WeightSource, format_of
from stages.core.presets.weight_table import StoredWeight, weight_table
from stages.core.records.layout import LoraConfig
from stages.core.records.model_config import ModelConfig

PIECE = 1 << 24
"""Numbers of a weight that are read and merged at a time (64 MiB of float32)."""


class TrainedWeights:
    """What finetune wrote, by weight path: LoRA kernels, or with rank 0 whole weights; each is read when asked for."""

    def __init__(self, path: Path | None) -> None:
        """Read the file's header; of None nothing was trained.

        Raises:
            StageError: the file is damaged.
        """
        self._path = path
        self._shapes: dict[str, tuple[int, ...]] = {}
        if path:
            with self._open() as file:
                self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def __contains__(self, path: object) -> bool:
        return path in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the whole weight."""
        return self._shapes[path]

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight. The file is closed again: what was read of a mapped file stays in memory."""
        with self._open() as file:
            return file.get_slice(path)[index]

    def array(self, path: str) -> np.ndarray:
        """Return a whole weight."""
        return self.read(path, tuple(slice(0, size) for size in self.shape(path)))

    def _open(self) -> Any:
        if self._path is None:
            raise KeyError("nothing was trained")
        try:
            return safe_open(self._path, framework="np")
        except (OSError, SafetensorError) as error:
            raise StageError(
                f"The tuned weights {self._path.name} cannot be read ({error}). Run `dvc repro finetune`."
            ) from error


@dataclass(frozen=True)
class Tuned:
    """The tuned variant, checked file by file; no weight is in memory.

    Attributes:
        preset: what it was tuned from.
        config: the variant's `model.json`.
        trained: what finetune wrote.
        lora: what was trained; rank 0 is every weight.
    """

    preset: variants.Preset
    config: ModelConfig
    trained: TrainedWeights
    lora: LoraConfig

    @property
    def kept_in(self) -> np.dtype:
        """The dtype that the pipeline holds the base in: its numbers are rounded to it before anything is added."""
        return np.dtype(ml_dtypes.bfloat16 if self.config.dtype == "bfloat16" else np.float32)

    def open_base(self) -> contextlib.AbstractContextManager[WeightSource]:
        """Return the weights before tuning, for a `with` block."""
        return format_of(self.preset.manifest.format).open_weights(self.preset.folder, self.preset.architecture)

    @contextlib.contextmanager
    def open_separate(self) -> Iterator[SeparateWeights]:
        """Yield the weights after tuning as they were trained: the base's, and the adapter's kernels beside them."""
        with self.open_base() as base:
            yield SeparateWeights(self, base)

    @contextlib.contextmanager
    def open_merged(self) -> Iterator[MergedWeights]:
        """Yield the weights after tuning, with the adapter merged into them."""
        with self.open_separate() as weights:
            yield weights.merged()


def open_tuned(paths: Paths) -> Tuned:
    """Check and open the tuned variant; reads no weight.

    Raises:
        StageError: it is missing or damaged, or was trained on another preset than there is now.
    """
    preset = variants.open_preset(paths)
    config = variants.read_config(paths, "tuned")
    if config.tuned is None:
        raise StageError("models/tuned must say what was trained. Received: none. Run `dvc repro finetune`.")
    path = paths.read(f"{variant_folder('tuned')}/{config.tuned.file}")
    for base in (config.base, adapter.describe(path)["base"]):
        if base != preset.fingerprint:
            raise StageError(
                f"models/tuned was made from another preset: {config.preset} ({base[:12]}). Received: "
                f"{preset.manifest.preset} ({preset.fingerprint[:12]}). Run `dvc repro`."
            )
    return Tuned(preset, config, TrainedWeights(path), config.tuned.lora)


class SeparateWeights:
    """The tuned model's weights by keras-hub's path: what was trained, else the base's as the pipeline holds them."""

    def __init__(self, tuned: Tuned, base: WeightSource) -> None:
        """Take the sources; nothing is read yet."""
        self.trained, self.lora = tuned.trained, tuned.lora
        self._base, self._kept_in = base, tuned.kept_in
        self.table = weight_table(tuned.preset.architecture)

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the whole weight."""
        return self.trained.shape(path) if path in self.trained else self.table[path].shape

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight in float32; not to be written to."""
        if path in self.trained:
            return self.trained.read(path, index).astype(np.float32, copy=False)
        return self._base.read(path, index).astype(self._kept_in, copy=False).astype(np.float32, copy=False)

    def merged(self) -> MergedWeights:
        """Return the same with the adapter merged in."""
        return MergedWeights(self)


class MergedWeights:
    """The tuned model's weights by keras-hub's path and in its shapes: W, or W + (alpha / rank) A B with an adapter.

    A is the kernel with the rank in place of its last axis, and B is (rank, last axis), so that a piece of the first
    axis is merged by itself.
    """

    def __init__(self, weights: SeparateWeights) -> None:
        """Take the source; nothing is read yet."""
        self._weights, self._rank, self._scale = weights, weights.lora.rank, np.float32(weights.lora.scale)
        self.table = weights.table

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the whole weight."""
        return self.table[path].shape

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight in float32; not to be written to."""
        base = self._weights.read(path, index)
        a, b = (f"{path.removesuffix('/kernel')}/lora_kernel_{name}" for name in "ab")
        if b not in self._weights.trained:
            return base
        narrow = self._weights.read(a, (*index[:-1], slice(0, self._rank)))
        merged = narrow @ (self._weights.read(b, (slice(0, self._rank), index[-1])) * self._scale)
        merged += base
        return merged


class RoundedWeights:
    """The tuned model's merged weights after rounding to a dtype, as float32."""

    def __init__(self, weights: MergedWeights, dtype: np.dtype, in_float32: Callable[[StoredWeight], bool]) -> None:
        """Take the source, and what returns whether a weight is not rounded; nothing is read yet."""
        self._weights, self._dtype, self._in_float32 = weights, dtype, in_float32

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the whole weight."""
        return self._weights.shape(path)

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight in float32."""
        values = self._weights.read(path, index)
        stays = self._in_float32(self._weights.table[path])
        return values if stays else values.astype(self._dtype).astype(np.float32)


def parts(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Return the indices of a weight's pieces; a single number is one of its own."""
    rest = tuple(slice(0, size) for size in shape[1:])
    return ((rows, *rest) for rows in pieces(shape)) if shape else iter([()])


def pieces(shape: tuple[int, ...], most: int = PIECE) -> Iterator[slice]:
    """Return consecutive slices of a weight's first axis, each of at most `most` numbers (but at least one step)."""
    step = max(1, most // int(np.prod(shape[1:], dtype=np.int64)))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def as_matrix(
    weight: StoredWeight,
    read: Callable[[tuple[slice, ...]], np.ndarray],
    dtype: Any = np.float32,
    begun: np.ndarray | None = None,
) -> np.ndarray:
    """Return a weight in the shape that PyTorch's layers have (outputs x inputs), filled piece by piece.

    Args:
        weight: its row of the weight table.
        read: returns a piece of keras-hub's weight, see `parts`.
        dtype: of the result; rounds to nearest, ties to even.
        begun: a result that holds another weight of the same tensor already; None: a new one.

    Returns:
        An array of `weight.matrix_shape`, contiguous.
    """
    result = np.empty(weight.matrix_shape, dtype) if begun is None else begun
    for part in parts(weight.shape):
        values, piece = read(part), part[0] if part else slice(None)
        if weight.kind in ("scale", "vector", "rows", "scalar"):
            result[piece] = values
        elif weight.kind.startswith("experts"):
            start = weight.shape[2] if weight.kind == "experts_up" else 0
            result[piece, start : start + weight.shape[2]] = values.transpose(0, 2, 1)
        elif weight.kind == "transposed":
            result[:, piece] = values.T
        elif weight.kind == "heads_out":
            size = weight.shape[2]
            rows = slice(piece.start * size, piece.stop * size)
            result[rows] = values.transpose(0, 2, 1).reshape(-1, weight.shape[1])
        else:
            size = weight.shape[1]
            columns = slice(piece.start * size, piece.stop * size)
            result[:, columns] = values.reshape(-1, weight.shape[2]).T
    return result
