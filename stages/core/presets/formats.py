"""The formats of a preset: for each, the functions that the stages need of it.

Purpose: the one place that chooses by a manifest's `format`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from stages.core.common.errors import StageError, shown
from stages.core.presets import (
    gguf,
    gguf_architecture,
    gguf_tokenizer,
    hf_config,
    hf_tokenizer,
    keras_config,
    keras_h5,
    safetensors,
)
from stages.core.presets.architecture import Architecture
from stages.core.presets.tokenizer import Tokenizer


class WeightSource(Protocol):
    """Anything that returns slices of weights by path."""

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight."""

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the whole weight."""


@dataclass(frozen=True)
class PresetFormat:
    """How a preset's folder is read; each function raises a StageError where the files are not what they should be.

    Attributes:
        read_architecture: gives the backbone's class and arguments; reads no weight.
        open_weights: opens the weights, which must be those of the architecture, for a `with` block.
        check_weights: holds what the files say of their weights against the architecture; loads none.
        load_tokenizer: gives the tokenizer.
        needed_files: gives the names of the files that the stages read, sorted.
    """

    read_architecture: Callable[[Path], Architecture]
    open_weights: Callable[[Path, Architecture], AbstractContextManager[WeightSource]]
    check_weights: Callable[[Path, Architecture], None]
    load_tokenizer: Callable[[Path], Tokenizer]
    needed_files: Callable[[Path], list[str]]


def format_of(name: str) -> PresetFormat:
    """Return a format by the name that manifests call it.

    Raises:
        StageError: there is none of this name.
    """
    formats = {
        "gguf": PresetFormat(
            gguf_architecture.read_architecture,
            gguf.open_weights,
            gguf.check_weights,
            gguf_tokenizer.load_tokenizer,
            gguf.needed_files,
        ),
        "keras": PresetFormat(
            keras_config.read_architecture,
            keras_h5.KerasWeights,
            keras_h5.check_weights,
            keras_config.load_tokenizer,
            keras_h5.needed_files,
        ),
        "safetensors": PresetFormat(
            hf_config.read_architecture,
            safetensors.open_weights,
            safetensors.check_weights,
            hf_tokenizer.load_tokenizer,
            safetensors.needed_files,
        ),
    }
    if name not in formats:
        raise StageError(f"A preset's format must be {', '.join(formats)}. Received: format={shown(name)}")
    return formats[name]
