"""A variant by its name: the pipeline's own, or the base with an adapter of the user's own folder (`variants`).

Reads: of the latter `models/baseline/model.json`, the preset, and the folder: `adapter.safetensors` (as in
`models/tuned`) or PEFT's two files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stages.core.adapters import peft
from stages.core.adapters.bases import check_base
from stages.core.adapters.peft_weights import AdaptedSource
from stages.core.common.errors import ParamsError, StageError, shown
from stages.core.common.paths import Paths, own_path
from stages.core.load import adapter, variants
from stages.core.load.variants import LoadedModel, Preset
from stages.core.presets.formats import WeightSource
from stages.core.records.layout import LoraConfig

OWN = adapter.FILE[True]


def open_variant(
    paths: Paths, name: str, adapters: Mapping[str, str], preset: Preset, *, trying: bool = False
) -> LoadedModel:
    """Put a variant on the devices.

    Args:
        paths: of inputs and outputs.
        name: baseline, tuned, or a key of `adapters`.
        adapters: folders by name, as the setting `variants` has them.
        preset: from `open_preset`.
        trying: as for `load_variant`.

    Raises:
        ParamsError: the folder holds no adapter.
        StageError: as for `load_variant` and `load_adapted`.
    """
    if name not in adapters:
        return variants.load_variant(paths, name, preset, trying=trying)
    folder = adapter_folder(paths, f"variants.{name}", adapters[name])
    return load_adapted(paths, folder, preset, trying=trying)


def adapter_folder(paths: Paths, setting: str, value: str) -> Path:
    """Return the folder of an adapter that a setting names.

    Raises:
        ParamsError: it holds none.
    """
    folder = own_path(paths.root, setting, value)
    if not (peft.is_peft(folder) or (folder / OWN).is_file()):
        raise ParamsError(
            f"{setting} must name a folder with {peft.CONFIG} and {peft.WEIGHTS} (PEFT's), or with {OWN} "
            f"(a copy of models/tuned). Received: {setting}={shown(value)}"
        )
    return folder


def load_adapted(paths: Paths, folder: Path, preset: Preset, *, trying: bool = False) -> LoadedModel:
    """Put the base with an adapter on the devices, as the baseline's mesh and layout say.

    An adapter of this project's is held beside the weights, as in `tuned`. One in PEFT's form is added to them while
    they are read, which is exact in float32; with `load.dtype: bfloat16` the sums are rounded to that, with one of int8
    they are what is quantized.

    Args:
        paths: of inputs and outputs.
        folder: from `adapter_folder`.
        preset: from `open_preset`.
        trying: as for `load_variant`.

    Raises:
        StageError: the baseline was made from another preset; the adapter is of another base, or does not fit it. The
            message has the difference.
    """
    config = variants.read_config(paths, "baseline")
    config = variants.for_trying(config) if trying else config
    if config.base != preset.fingerprint:
        raise StageError(
            f"models/baseline was made from another preset: {config.preset} ({config.base[:12]}). "
            f"Received: {preset.manifest.preset} ({preset.fingerprint[:12]}). Run `dvc repro`."
        )
    if peft.is_peft(folder):
        found = peft.read_peft(folder, preset.architecture, preset.manifest.preset)
        check_base(found.base, preset.manifest, folder)

        def adapted(files: WeightSource) -> WeightSource:
            return AdaptedSource(files, found)

        model = variants.declare_model(config, preset.architecture, None)
        variants.fill_model(model, preset, {}, adapted)
        return model
    lora = own_lora(folder, preset)
    model = variants.declare_model(config, preset.architecture, lora)
    variants.fill_model(
        model, preset, adapter.load(folder / OWN, preset.fingerprint), chosen=variants.codes_of(paths, config)
    )
    return model


def own_lora(folder: Path, preset: Preset) -> LoraConfig:
    """Return rank, alpha and targets of an adapter of this project's.

    Raises:
        StageError: it was trained on another base.
    """
    said = adapter.describe(folder / OWN)
    if said["base"] != preset.fingerprint:
        raise StageError(
            f"The adapter must be of the base that it is put on, {preset.manifest.preset} ({preset.fingerprint[:12]}). "
            f"Received: one of {shown(said['preset'])} ({said['base'][:12]}) in {folder}"
        )
    return LoraConfig(said["rank"], said["alpha"], tuple(said["targets"]))
