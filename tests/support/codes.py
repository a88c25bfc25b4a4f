"""The float model of the numbers that a quantized model's codes stand for."""

from __future__ import annotations

from pathlib import Path

from stages.core.load import variants
from stages.core.load.variants import LoadedModel
from stages.core.records.layout import LoraConfig
from tests.support.tiny_models import describe, float_values, open_tiny


def numbers_of(codes: LoadedModel, folder: Path, lora: LoraConfig) -> LoadedModel:
    """The float model on one device, with the adapter of the model of codes."""
    preset = open_tiny(folder)
    floats = variants.declare_model(describe(preset, (1, 1)), preset.architecture, lora)
    variants.fill_model(floats, preset, float_values(codes))
    return floats
