"""Reading keras-hub's weight files (`model.weights.h5`, one or several) by weight path, in slices.

Purpose: Keras only offers to load a whole file into a model that already holds random numbers. This finds out where
in the file each weight lies by letting Keras walk the model as it would to save it. The only place that uses Keras'
saving internals; `tests/test_loading.py` holds it to `load_weights`.
Reads: `model.weights.h5`, or `model.weights.json` and the files it names.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from stages.core.errors import StageError

if TYPE_CHECKING:
    import keras
    import numpy as np


def dataset_names(backbone: keras.Model) -> dict[str, str]:
    """Return for each weight path the name of its dataset in a weights file, such as `layers/.../vars/0`."""
    from keras.src.saving import saving_lib

    recorded: dict[str, dict[str, Any]] = {}

    class Recorder(saving_lib.H5IOStore):
        """Takes what layers would save, and writes nothing."""

        def __init__(self) -> None:
            pass

        def __bool__(self) -> bool:
            return True

        def make(self, path: str, metadata: dict | None = None) -> dict[str, Any]:
            return recorded.setdefault(path, {})

    # With an adapter on, Keras would merge it into what it saves; the preset's files know of none.
    adapted = [layer for layer in backbone._flatten_layers() if getattr(layer, "lora_enabled", False)]
    for layer in adapted:
        layer.lora_enabled = False
    try:
        saving_lib._save_state(
            backbone, weights_store=Recorder(), assets_store=None, inner_path="", visited_saveables=set()
        )
    finally:
        for layer in adapted:
            layer.lora_enabled = True
    return {
        variable.path: f"{path}/vars/{name}"
        for path, variables in recorded.items()
        for name, variable in variables.items()
    }


class KerasWeights:
    """The weights of a preset folder, read slice by slice; a context manager, since it keeps files open."""

    def __init__(self, folder: Path, backbone: keras.Model) -> None:
        """Open the folder's weight files.

        Args:
            folder: a keras-hub preset folder.
            backbone: the model the files are for; only its structure is used.

        Raises:
            StageError: no weights file, or one that HDF5 cannot open.
        """
        import h5py

        self._names = dataset_names(backbone)
        self._files: dict[str, Any] = {}
        self._found: dict[str, Any] = {}
        self._map: dict[str, list[str]] = {}
        index = folder / "model.weights.json"
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            # A folder of the file may be spread over several files; Keras then lists all of them.
            self._map = {
                key.strip("/"): [value] if isinstance(value, str) else value for key, value in weight_map.items()
            }
            names = sorted({name for entry in self._map.values() for name in entry})
        else:
            names = ["model.weights.h5"]
        for name in names:
            try:
                self._files[name] = h5py.File(folder / name, "r")
            except OSError as error:
                raise StageError(
                    f"The weights file {name} cannot be opened as HDF5 ({error}). Fetch the preset again: "
                    "`python -m stages.fetch`."
                ) from error

    def __enter__(self) -> KerasWeights:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight, in the file's dtype; only that slice is read.

        Raises:
            StageError: the files do not hold the weight.
        """
        import ml_dtypes

        dataset = self._dataset(path)
        values = dataset[index]
        # HDF5 has no bfloat16: Keras writes two opaque bytes a value and notes what they are, as most presets have it.
        return values.view(ml_dtypes.bfloat16) if dataset.attrs.get("dtype") == "bfloat16" else values

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the whole weight's shape in the file."""
        return tuple(self._dataset(path).shape)

    def _dataset(self, path: str) -> Any:
        """Return a weight's dataset; finding it takes longer than reading a small one."""
        if path not in self._found:
            self._found[path] = self._find(path)
        return self._found[path]

    def _find(self, path: str) -> Any:
        name = self._names[path]
        # Files of keras-hub's first presets call the list of layers by an internal name.
        for candidate in (name, name.replace("layers/", "_layer_checkpoint_dependencies/", 1)):
            for file in self._files.values():
                if candidate in file:
                    return _own(file, candidate)
        raise StageError(
            f"The preset's weight files must hold every weight of its architecture. Received: none for {path}. "
            "Fetch the preset again: `python -m stages.fetch`."
        )


def _own(file: Any, name: str) -> Any:
    """Return a dataset of a file, whose bytes lie in that very file: HDF5 could have them read from any other.

    Raises:
        StageError: it is a link or a view of another file.
    """
    dataset = file[name]
    if dataset.file.filename != file.filename or dataset.external or dataset.is_virtual:
        raise StageError(
            f"The weights file {Path(file.filename).name} must hold its own values. Received: {name} is read from "
            "another file.\nDo not use this preset unless you know who made it, and why so."
        )
    return dataset
