"""The adapter that a training run continues (`finetune.start_from`): one of this project's, or one in PEFT's form.

Reads: the user's folder, with `adapter.safetensors` (as in `models/tuned`) or PEFT's two files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stages.core.adapters import peft
from stages.core.adapters.adapted import OWN, adapter_folder, own_lora
from stages.core.adapters.bases import check_base
from stages.core.adapters.peft_weights import keras_kernels
from stages.core.common.errors import ParamsError, StageError, shown
from stages.core.common.paths import Paths, own_path, variant_folder
from stages.core.files import sha256
from stages.core.load import adapter
from stages.core.load.variants import Preset
from stages.core.records.layout import LoraConfig


def start_folder(paths: Paths, setting: str | None) -> Path | None:
    """Return the folder that `finetune.start_from` names, None for null.

    Raises:
        ParamsError: it holds no adapter, or is `models/tuned`, which the stage writes (and DVC removes before).
    """
    if setting is None:
        return None
    named = own_path(paths.root, "finetune.start_from", setting).resolve()
    if named in [(base / variant_folder("tuned")).resolve() for base in (paths.root, paths.out_root)]:
        raise ParamsError(
            "finetune.start_from must not be models/tuned, which this stage writes anew. "
            f"Received: finetune.start_from={shown(setting)}\nName a copy: `cp -r models/tuned models/first`."
        )
    return adapter_folder(paths, "finetune.start_from", setting)


def digest(folder: Path) -> str:
    """Return what the adapter's files have for content, as one SHA-256 in hexadecimal."""
    names = (peft.CONFIG, peft.WEIGHTS) if peft.is_peft(folder) else (OWN,)
    lines = "".join(f"{name} {sha256(folder / name)}\n" for name in names if (folder / name).is_file())
    return hashlib.sha256(lines.encode()).hexdigest()


def starting_kernels(
    folder: Path, preset: Preset, lora: LoraConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Return the values that LoRA kernels start from, by path: with them the model is the base with the adapter.

    Args:
        folder: from `start_folder`.
        preset: that is tuned.
        lora: of the run. Its alpha may differ from the adapter's: B is scaled so that the model is the same.
        shapes: of the run's LoRA kernels, by path.

    Raises:
        StageError: the adapter is of another base or rank, or on other layers; names the difference.
    """
    if peft.is_peft(folder):
        found = peft.read_peft(folder, preset.architecture, preset.manifest.preset)
        check_base(found.base, preset.manifest, folder)
        kernels = keras_kernels(found, lora.rank, lora.scale)
    else:
        kernels = _own(folder, preset, lora)
    for layers, said in ((kernels.keys() - shapes.keys(), "also has"), (shapes.keys() - kernels.keys(), "lacks")):
        if layers:
            named = peft.some({path.rpartition("/")[0] for path in layers})
            raise StageError(
                f"finetune.start_from must be on the layers that finetune.targets names, and {said} {named}. "
                f"Received: finetune.targets={shown(list(lora.targets))}, adapter={folder}"
            )
    for path, values in kernels.items():
        if values.shape != shapes[path]:
            raise StageError(
                f"finetune.start_from must have {path} of shape {shapes[path]}. "
                f"Received: shape={values.shape} in {folder}"
            )
    return kernels


def _own(folder: Path, preset: Preset, lora: LoraConfig) -> dict[str, np.ndarray]:
    """Return the kernels of an adapter of this project's, scaled for another alpha.

    Raises:
        StageError: it was trained on another base, or has another rank.
    """
    before = own_lora(folder, preset)
    if before.rank != lora.rank:
        raise StageError(
            f"finetune.rank must be that of finetune.start_from, {before.rank}. Received: finetune.rank={lora.rank}"
        )
    factor = np.float32(before.scale / lora.scale)
    arrays = adapter.load(folder / OWN, preset.fingerprint)
    return {name: values * factor if name.endswith("_b") else values for name, values in arrays.items()}
