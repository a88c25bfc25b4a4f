"""A keras-hub preset's `config.json` as the class and arguments of its backbone, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.core.common.errors import StageError, shown
from stages.core.presets.architecture import BOOKKEEPING, FAMILIES, Architecture
from stages.core.presets.tokenizer import KERAS_VOCABULARY, Tokenizer
from stages.core.presets.untrusted import brief, read_object

FLOATS = ("float32", "bfloat16", "float16", "float64", "mixed_bfloat16", "mixed_float16")

TOWERS = ("vision_encoder", "audio_encoder")
"""Arguments with the towers of a Gemma 4, which every preset has; the text model alone is built."""

# What Keras and keras-hub's older presets write in addition to class and arguments; none of it is read.
KERAS_KEYS = {
    *("module", "class_name", "config", "registered_name", "build_config", "compile_config", "shared_object_id"),
    *("assets", "weights"),
}


def read_architecture(folder: Path) -> Architecture:
    """Return the architecture of a keras-hub preset.

    Raises:
        StageError: it is not a text Gemma's, or has something that the forward pass does not compute.
    """
    content = read_object(folder / "config.json")
    if not isinstance(content.get("class_name"), str) or not isinstance(content.get("config"), dict):
        raise StageError(
            f"{folder / 'config.json'} must hold the class_name and config of a backbone. "
            f"Received: keys {shown(', '.join(content))}"
        )
    if unknown := content.keys() - KERAS_KEYS:
        raise StageError(
            f"{folder / 'config.json'} has a key that Keras does not write. Received: {shown(min(unknown))}"
        )
    arguments = content["config"]
    _refuse_quantized(arguments.get("dtype"))
    name = content["class_name"]
    kept = {key: value for key, value in arguments.items() if key not in BOOKKEEPING}
    if name in FAMILIES and FAMILIES[name].towers:
        kept |= dict.fromkeys(TOWERS)
    return Architecture(name, kept)


def _refuse_quantized(dtype: Any) -> None:
    """Refuse a dtype policy under which the numbers in the file are not the weights.

    Raises:
        StageError: it is none of plain floats.
    """
    name = dtype
    if isinstance(dtype, dict) and dtype.get("class_name") == "DTypePolicy" and isinstance(dtype.get("config"), dict):
        name = dtype["config"].get("name")
    if name is not None and name not in FLOATS:
        raise StageError(
            f"The weights must be plain floats, not quantized: save the preset before `quantize`. "
            f"Received: dtype={brief(dtype)}"
        )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a keras-hub preset.

    Raises:
        StageError: the folder has no vocabulary, or not that of a Gemma.
    """
    return Tokenizer.from_file(folder, KERAS_VOCABULARY, "A keras-hub preset")
