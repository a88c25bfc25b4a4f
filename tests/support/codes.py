"""The float model of the numbers that a model's int8 codes stand for, rounded by plain NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stages.core.load import variants
from stages.core.load.variants import LoadedModel
from stages.core.records.layout import LoraConfig
from tests.support.tiny_models import describe, open_tiny, values_of


class Rounded:
    """Weights of a preset, each the nearest of the 255 steps of its channel."""

    def __init__(self, files, table: bool) -> None:
        self._files, self._table = files, table

    def shape(self, path):
        return self._files.shape(path)

    def read(self, path, index):
        whole = self._files.read(path, tuple(slice(0, size) for size in self.shape(path))).astype("f4")
        layer, name = path.split("/")[-2:]
        if (name == "kernel" and layer != "per_layer_model_projection") or (name == "embeddings" and self._table):
            axes = {"attention_output": (0, 1)}.get(layer, (0,) if whole.ndim == 2 and name == "kernel" else (1,))
            step = np.abs(whole).max(axis=axes, keepdims=True) / np.float32(127)
            whole = np.rint(whole / step) * step
        return whole[index]


def numbers_of(codes: LoadedModel, folder: Path, lora: LoraConfig, *, table: bool) -> LoadedModel:
    """The float model on one device, with the adapter of the model of codes; `table`: embeddings are codes too."""
    preset = open_tiny(folder)
    floats = variants.declare_model(describe(preset, (1, 1)), preset.architecture, lora)
    adapters = {path: value for path, value in values_of(codes).items() if "lora" in path}
    variants.fill_model(floats, preset, adapters, lambda files: Rounded(files, table))
    return floats
