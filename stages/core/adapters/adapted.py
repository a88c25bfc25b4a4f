"""A variant beyond baseline and tuned: the base with an adapter of the user's own folder, as a model in memory.

Reads: `models/baseline/model.json`, the preset, and the folder: `adapter.safetensors` (as in `models/tuned`) or PEFT's
two files.
"""

from __future__ import annotations

from pathlib import Path

from stages.core.adapters import peft
from stages.core.adapters.peft_weights import AdaptedSource
from stages.core.common.errors import StageError, shown
from stages.core.common.paths import Paths
from stages.core.load import adapter, variants
from stages.core.load.variants import LoadedModel, Preset
from stages.core.presets.formats import WeightSource
from stages.core.records.layout import LoraConfig

OWN = adapter.FILE[True]


def load_adapted(paths: Paths, folder: Path, preset: Preset) -> LoadedModel:
    """Put the base with an adapter on the devices, as the baseline's mesh and layout say.

    An adapter of this project's is held beside the weights, as in `tuned`. One in PEFT's form is added to them while
    they are read, which is exact in float32; with `load.dtype: bfloat16` the sums are rounded to that, with one of int8
    they are what is quantized.

    Args:
        paths: where things lie.
        folder: with the adapter.
        preset: from `open_preset`.

    Raises:
        StageError: the baseline was made from another preset; the adapter is of another base, or does not fit it; the
            folder holds none. The message has the difference.
    """
    config = variants.read_config(paths, "baseline")
    if config.base != preset.fingerprint:
        raise StageError(
            f"models/baseline was made from another preset: {config.preset} ({config.base[:12]}). "
            f"Received: {preset.manifest.preset} ({preset.fingerprint[:12]}). Run `dvc repro`."
        )
    if peft.is_peft(folder):
        found = peft.read_peft(folder, preset.architecture, preset.manifest.preset)

        def adapted(files: WeightSource) -> WeightSource:
            return AdaptedSource(files, found)

        model = variants.declare_model(config, preset.architecture, None)
        variants.fill_model(model, preset, {}, adapted)
        return model
    lora = own_lora(folder, preset)
    model = variants.declare_model(config, preset.architecture, lora)
    variants.fill_model(model, preset, adapter.load(folder / OWN, preset.fingerprint))
    return model


def own_lora(folder: Path, preset: Preset) -> LoraConfig:
    """Return rank, alpha and targets of an adapter of this project's.

    Raises:
        StageError: the folder holds none, or one that was trained on another base.
    """
    if not (folder / OWN).is_file():
        raise StageError(
            f"An adapter's folder must hold {peft.CONFIG} and {peft.WEIGHTS} (PEFT's), or {OWN} (a copy of "
            f"models/tuned). Received: {shown(folder)}"
        )
    said = adapter.describe(folder / OWN)
    if said["base"] != preset.fingerprint:
        raise StageError(
            f"The adapter must be of the base that it is put on, {preset.manifest.preset} ({preset.fingerprint[:12]}). "
            f"Received: one of {shown(said['preset'])} ({said['base'][:12]}) in {folder}"
        )
    return LoraConfig(said["rank"], said["alpha"], tuple(said["targets"]))
