"""The tuned weights on disk: an adapter (or, with rank 0, all weights) as safetensors keyed by weight path.

Purpose: one self-describing file; loading it on another base is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from stages.core.common.errors import StageError
from stages.core.files import atomic_path
from stages.core.load.arrays import write_arrays

FILE = {True: "adapter.safetensors", False: "weights.safetensors"}


def save(path: Path, arrays: dict[str, np.ndarray], description: dict[str, Any]) -> None:
    """Write the trained weights atomically; the same arrays and description give the same bytes.

    Args:
        path: the target file.
        arrays: weight path to array.
        description: base, preset, rank, alpha and targets; kept as one JSON text, since safetensors writes several
            metadata keys in an order that changes from run to run.
    """
    with atomic_path(path) as temporary:
        write_arrays(
            temporary,
            {name: arrays[name] for name in sorted(arrays)},
            metadata={"gemma_tuning": json.dumps(description, sort_keys=True)},
        )


def describe(path: Path) -> dict[str, Any]:
    """Return the description that `save` was given.

    Raises:
        StageError: the file is missing, damaged, or was not written by `save`.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise StageError(
            f"The tuned weights {path.name} cannot be read ({error}). Run `dvc repro finetune`."
        ) from error
    if "gemma_tuning" not in metadata:
        raise StageError(f"{path.name} must be written by this project's finetune stage. Received: {metadata}.")
    return json.loads(metadata["gemma_tuning"])


def load(path: Path, base: str) -> dict[str, np.ndarray]:
    """Return the arrays by weight path.

    Args:
        path: the safetensors file.
        base: the fingerprint of the preset it is to be put on.

    Raises:
        StageError: the file was trained on another base, or is damaged.
    """
    description = describe(path)
    if description["base"] != base:
        raise StageError(
            f"Tuned weights must be applied to the base they were trained on: {description['preset']} "
            f"({description['base'][:12]}). Received: base={base[:12]}. Run `dvc repro finetune` for this preset."
        )
    return load_file(path)
