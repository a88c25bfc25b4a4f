"""A Gemma's shape without its weights: the backbone's class and arguments, and a backbone that allocates nothing.

Purpose: everything about a preset that layouts, loading and planning need before a byte of weights is read.
Reads: `config.json` of a keras-hub preset or of a Hugging Face folder, or the metadata of a GGUF file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import StageError

if TYPE_CHECKING:
    import keras

BACKBONES = ("GemmaBackbone", "Gemma3Backbone")


@dataclass(frozen=True)
class Architecture:
    """A keras-hub backbone class by name, and its arguments (without dtype)."""

    class_name: str
    config: dict[str, Any]

    def __post_init__(self) -> None:
        if self.class_name not in BACKBONES:
            raise StageError(
                f"The preset must be a text Gemma ({' or '.join(BACKBONES)}). Received: backbone={self.class_name}."
            )
        if self.config.get("vision_encoder") is not None:
            raise StageError(
                "The preset must be a text model. Received: a Gemma with a vision encoder. Use its _text preset."
            )


def read_architecture(folder: Path, file_format: str) -> Architecture:
    """Return the architecture of a preset folder.

    Args:
        folder: the folder with the preset's files.
        file_format: the manifest's: `keras`, `safetensors` (both have a `config.json`) or `gguf` (one `.gguf` file).

    Raises:
        StageError: the preset is not a text Gemma, or its file is not there.
    """
    if file_format == "gguf":
        from stages.core import gguf

        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise StageError(
                f"The preset folder must hold one .gguf file. Received: {len(files)} in {folder}. "
                "Run `python -m stages.fetch`."
            )
        found = gguf.read_architecture(files[0])
        return Architecture(found["class_name"], found["config"])
    if file_format == "safetensors":
        from stages.core import safetensors_weights

        found = safetensors_weights.read_architecture(folder)
        return Architecture(found["class_name"], found["config"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Keras' own bookkeeping, none of the backbone's arguments; dtype is ours to choose.
    arguments = {key: value for key, value in config["config"].items() if key not in ("name", "trainable", "dtype")}
    return Architecture(config["class_name"], arguments)


def build_backbone(architecture: Architecture, dtype: str) -> keras.Model:
    """Return the keras-hub backbone with all its variables declared and none allocated.

    Its variables have shapes, dtypes and paths, but no values and no layout: `loading.fill` gives them both.

    Args:
        architecture: class and arguments.
        dtype: a Keras dtype policy name: `float32`, `bfloat16` or `mixed_bfloat16`.
    """
    from stages.core.devices import import_keras_hub

    backbone_class = getattr(import_keras_hub().models, architecture.class_name)
    with declared_only():
        return backbone_class(**architecture.config, dtype=dtype, name="backbone")


@contextlib.contextmanager
def declared_only() -> Iterator[None]:
    """Within this block new Keras variables get a shape, a dtype and a path, and no value.

    `from_preset` would fill them with random numbers first and throw these away. Keras keeps a list of such variables
    and would initialise them when any later stateless scope ends, so they are taken off it.
    """
    import keras
    from keras.src.backend.common import global_state

    before = list(global_state.get_global_attribute("uninitialized_variables", [], set_to_default=True))
    with keras.StatelessScope(initialize_variables=False):
        yield
    global_state.set_global_attribute("uninitialized_variables", before)
