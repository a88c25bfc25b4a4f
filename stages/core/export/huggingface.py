"""The tuned model as a Hugging Face folder: transformers, vLLM, llama.cpp's converter and others read it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from stages.core.export.hugging_face_config import write_config, write_generation_config
from stages.core.export.hugging_face_tokenizer import write_tokenizer
from stages.core.export.safetensors_file import write_model
from stages.core.export.tensors import hugging_face_shapes, hugging_face_tensors
from stages.core.export.tuned import MergedWeights
from stages.core.load.variants import Preset
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import WeightSource, format_of

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write_folder(
    folder: Path, preset: Preset, weights: MergedWeights, dtype: str, *, chat: bool, ends: list[int]
) -> None:
    """Write the merged model.

    Args:
        folder: to write to; made if it is not there.
        preset: that the model was tuned from.
        weights: the merged ones.
        dtype: of the weights: float32 or bfloat16.
        chat: with the chat template.
        ends: ids that end a generation.

    Raises:
        StageError: transformers' Gemma cannot express the model.
        OSError: the disk is full, or a file cannot be written.
    """
    architecture = preset.architecture
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, architecture, dtype)
    write_generation_config(folder, architecture, ends)
    write_tokenizer(folder, preset, chat)
    tensors = hugging_face_tensors(weights, DTYPES[dtype])
    write_model(folder, hugging_face_shapes(architecture), DTYPES[dtype], tensors)


@contextlib.contextmanager
def read_folder(folder: Path) -> Iterator[tuple[Architecture, WeightSource]]:
    """Yield what the folder says of itself: the architecture, and the weights by keras-hub's paths.

    Raises:
        StageError: it is not a whole Hugging Face folder of a text Gemma.
    """
    reader = format_of("safetensors")
    architecture = reader.read_architecture(folder)
    reader.check_weights(folder, architecture)
    with reader.open_weights(folder, architecture) as weights:
        yield architecture, weights
