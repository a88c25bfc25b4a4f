"""The smallest keras-hub preset, made without Keras: for tests that handle its files and never run the model."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from stages.core.fetch.local import list_files
from stages.core.presets.architecture import Architecture
from stages.core.presets.manifest import LICENSE
from stages.core.presets.weight_table import weight_table
from stages.core.records.manifest import Manifest
from tests.support.tiny_presets import VOCABULARY_SIZE, tiny_proto

SMALLEST = {
    "vocabulary_size": VOCABULARY_SIZE,
    "num_layers": 2,
    "num_query_heads": 1,
    "num_key_value_heads": 1,
    "hidden_dim": 2,
    "intermediate_dim": 4,
    "head_dim": 2,
}
NAMES = ["assets/tokenizer/vocabulary.spm", "config.json", "model.weights.h5"]
CONFIG = {"class_name": "GemmaBackbone", "registered_name": "keras_hub>GemmaBackbone", "config": SMALLEST}


def weight_bytes(files: int = 1, number: int = 0, value: float = 1.0) -> bytes:
    """The content of one of the preset's weight files, all its weights of one value."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        weights = weight_table(Architecture(CONFIG["class_name"], SMALLEST)).values()
        for weight in sorted(weights, key=lambda each: each.keras)[number::files]:
            file[weight.keras] = np.full(weight.shape, value, "f4")
    return content.getvalue()


@functools.cache
def vocabulary() -> bytes:
    """Its SentencePiece model."""
    return tiny_proto()


def preset_files(weights: Sequence[str] = ("model.weights.h5",)) -> dict[str, bytes]:
    """The files of the preset, by name; its weights in one file or several."""
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "assets/tokenizer/vocabulary.spm": vocabulary(),
    }
    return files | {name: weight_bytes(len(weights), number) for number, name in enumerate(weights)}


def make_preset(folder: Path, weights: Sequence[str] = ("model.weights.h5",)) -> Path:
    """Write the files of the preset."""
    for name, content in preset_files(weights).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def manifest_of(folder: Path, names: Sequence[str] = NAMES) -> Manifest:
    """The manifest of a folder's files."""
    return Manifest(
        preset="tiny",
        source="path",
        format="keras",
        handle=None,
        folder=str(folder),
        license=LICENSE,
        files=list_files(folder, names),
    )
