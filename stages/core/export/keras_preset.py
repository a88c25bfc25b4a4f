"""The tuned model as a keras-hub preset: `from_preset` reads it, and vLLM on TPUs through keras-hub.

The files are those of keras-hub's `save_to_preset`, which takes the whole model in memory, and drops an adapter.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from stages.core.export.huggingface import DTYPES
from stages.core.export.tuned import MergedWeights, parts
from stages.core.export.vocabulary import sentencepiece_model
from stages.core.files import atomic_path, write_json
from stages.core.load.backbone import build_backbone
from stages.core.load.variants import Preset
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import WeightSource, format_of
from stages.core.presets.keras_h5 import SINGLE
from stages.core.presets.tokenizer import KERAS_VOCABULARY

TASKS = {
    "GemmaBackbone": ["CausalLM"],
    "Gemma3Backbone": ["CausalLM", "TextEmbedder"],
    "Gemma4Backbone": ["CausalLM"],
}
SEQUENCE = 1024
"""keras-hub's default of its preprocessors, in tokens; it can be set after loading."""


def write_preset(folder: Path, preset: Preset, weights: MergedWeights, dtype: str) -> None:
    """Write the merged model as a preset.

    Args:
        folder: to write to; made if it is not there.
        preset: that the model was tuned from.
        weights: the merged ones.
        dtype: of the weights: float32 or bfloat16.

    Raises:
        OSError: the disk is full, or a file cannot be written.
    """
    architecture = preset.architecture
    config = keras.saving.serialize_keras_object(build_backbone(architecture, dtype))
    for key in ("compile_config", "build_config"):
        config.pop(key, None)
    config["config"]["name"] = re.sub(r"(?<!^)(?=[A-Z])", "_", architecture.class_name).lower()
    write_json(folder / "config.json", config)
    with atomic_path(folder / SINGLE) as temporary, h5py.File(temporary, "w") as file:
        for path, weight in weights.table.items():
            _write_weight(file, weight.keras, weight.shape, dtype, functools.partial(weights.read, path))
    write_json(
        folder / "metadata.json",
        {
            "keras_version": version("keras"),
            "keras_hub_version": version("keras-hub"),
            "parameter_count": sum(int(np.prod(each.shape)) for each in weights.table.values()),
            "tasks": TASKS[architecture.class_name],
        },
    )
    _write_tokenizer(folder, preset, dtype)


def _write_weight(file: Any, name: str, shape: tuple[int, ...], dtype: str, read: Any) -> None:
    """Write a weight piece by piece; HDF5 has no bfloat16, which Keras keeps as two opaque bytes and a note."""
    opaque = dtype == "bfloat16"
    dataset = file.create_dataset(name, shape, np.dtype("V2") if opaque else np.float32)
    if opaque:
        dataset.attrs["dtype"] = "bfloat16"
    for part in parts(shape):
        values = np.asarray(read(part), DTYPES[dtype], order="C")
        dataset[part] = values.view("V2") if opaque else values


def _object(family: str, kind: str, config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a layer of a family as Keras serializes it; of its module the name follows from the class's."""
    class_name = f"{family}{kind}"
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=LM)(?=P)", "_", class_name).lower()
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": dtype}, "registered_name": None}
    return {
        "module": f"keras_hub.src.models.{family.lower()}.{name}",
        "class_name": class_name,
        "config": {"name": name, "trainable": True, "dtype": policy, **config},
        "registered_name": f"keras_hub>{class_name}",
    }


def _write_tokenizer(folder: Path, preset: Preset, dtype: str) -> None:
    """Write the vocabulary, and the tokenizer and preprocessor around it; Keras' own import TensorFlow."""
    family = preset.architecture.class_name.removesuffix("Backbone")
    gemma3, gemma4 = family == "Gemma3", family == "Gemma4"
    with atomic_path(folder / KERAS_VOCABULARY) as temporary:
        temporary.write_bytes(sentencepiece_model(preset).SerializeToString(deterministic=True))
    settings: dict[str, Any] = {"config_file": "tokenizer.json", "proto": None, "sequence_length": None}
    settings |= {"add_bos": False, "add_eos": False, **({"has_vision_tokens": False} if gemma3 or gemma4 else {})}
    if gemma4:
        settings |= {"has_audio_tokens": False, "has_video_tokens": False}
    tokenizer = _object(family, "Tokenizer", settings, "int32")
    write_json(folder / "tokenizer.json", tokenizer)
    around: dict[str, Any] = {"tokenizer": tokenizer, "config_file": "preprocessor.json", "sequence_length": SEQUENCE}
    around |= {"add_start_token": True, "add_end_token": True}
    if gemma3:
        around |= {"num_vision_tokens_per_image": 256, "max_images_per_prompt": 2}
    write_json(folder / "preprocessor.json", _object(family, "CausalLMPreprocessor", around, dtype))


@contextlib.contextmanager
def read_preset(folder: Path) -> Iterator[tuple[Architecture, WeightSource]]:
    """Yield what the preset says of itself: the architecture, and the weights by keras-hub's paths.

    Raises:
        StageError: it is not a whole preset of a text Gemma.
    """
    reader = format_of("keras")
    architecture = reader.read_architecture(folder)
    with reader.open_weights(folder, architecture) as weights:
        yield architecture, weights
