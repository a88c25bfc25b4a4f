"""Reading keras-hub's weight files (`model.weights.h5`, one or several) by weight path, in slices.

Purpose: Keras only offers to load a whole file into a model that already holds random numbers. This knows where in the
file each weight lies, and that there is nothing else in it; `tests/test_loading.py` holds it to what Keras writes.
Reads: `model.weights.h5`, or `model.weights.json` and the files it names.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from stages.core.architecture import Architecture
from stages.core.errors import StageError, shown
from stages.core.safetensors_weights import shards_of
from stages.core.untrusted import read_object

if TYPE_CHECKING:
    import numpy as np

SINGLE, INDEX = "model.weights.h5", "model.weights.json"

# What a file may hold beside the weights: the counters of random numbers that dropout layers keep.
SEEDS = re.compile(r".*/seed_generator(_state)?/.*")


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the weight files: those that the index names, or the single one.

    Raises:
        StageError: the index cannot be read.
    """
    return shards_of(read_object(folder / INDEX), folder / INDEX) if (folder / INDEX).is_file() else (SINGLE,)


def stored_weights(architecture: Architecture) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return for each weight path the name of its dataset in a weights file, and its shape.

    Keras names layers by their classes and counts them: `layers/gemma_decoder_block_1/attention/key_dense/vars/0`.
    """
    config, gemma3 = architecture.config, architecture.class_name == "Gemma3Backbone"
    hidden, head_dim = config["hidden_dim"], config["head_dim"]
    heads, key_heads = config["num_query_heads"], config["num_key_value_heads"]
    # GemmaBackbone counts both gate matrices, Gemma3Backbone counts one.
    wide = config["intermediate_dim"] // (1 if gemma3 else 2)
    block = {
        "pre_attention_norm/scale": ("pre_attention_norm", (hidden,)),
        "attention/query/kernel": ("attention/query_dense", (heads, hidden, head_dim)),
        "attention/key/kernel": ("attention/key_dense", (key_heads, hidden, head_dim)),
        "attention/value/kernel": ("attention/value_dense", (key_heads, hidden, head_dim)),
        "attention/attention_output/kernel": ("attention/output_dense", (heads, head_dim, hidden)),
        "pre_ffw_norm/scale": ("pre_ffw_norm", (hidden,)),
        "ffw_gating/kernel": ("gating_ffw", (hidden, wide)),
        "ffw_gating_2/kernel": ("gating_ffw_2", (hidden, wide)),
        "ffw_linear/kernel": ("ffw_linear", (wide, hidden)),
    }
    for norm in ("post_attention_norm", "post_ffw_norm"):
        if config.get(f"use_{norm}", False):
            block[f"{norm}/scale"] = (norm, (hidden,))
    if gemma3 and config.get("use_query_key_norm", True):
        for norm in ("query_norm", "key_norm"):
            block[f"attention/{norm}/scale"] = (f"attention/{norm}", (head_dim,))
    found = {
        "token_embedding/embeddings": ("layers/reversible_embedding/vars/0", (config["vocabulary_size"], hidden)),
        "final_normalization/scale": ("layers/rms_normalization/vars/0", (hidden,)),
    }
    for number in range(config["num_layers"]):
        layer = f"layers/gemma{'3' if gemma3 else ''}_decoder_block{f'_{number}' if number else ''}"
        for path, (name, shape) in block.items():
            found[f"decoder_block_{number}/{path}"] = (f"{layer}/{name}/vars/0", shape)
    return found


class KerasWeights:
    """The weights of a preset folder, read slice by slice; a context manager, since it keeps files open."""

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        """Open the folder's weight files, and check that they hold the architecture's weights and nothing else.

        Raises:
            StageError: no weights file, one that HDF5 cannot open, or a weight that is missing, unknown, of another
                shape, or not of plain floats; names it.
        """
        import h5py

        self._files: dict[str, Any] = {}
        self._found: dict[str, Any] = {}
        try:
            for name in weight_files(folder):
                try:
                    self._files[name] = h5py.File(folder / name, "r")
                except OSError as error:
                    raise StageError(
                        f"The weights file {name} cannot be opened as HDF5 ({error}). Fetch the preset again: "
                        "`python -m stages.fetch`."
                    ) from error
            try:
                self._check(architecture)
            except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, OverflowError) as error:
                raise StageError(
                    f"The weight files must be complete HDF5 files as Keras writes them. Received: "
                    f"{shown(error)} in {folder}. Fetch the preset again: `python -m stages.fetch`."
                ) from error
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _check(self, architecture: Architecture) -> None:
        """Find each weight, and hold what the files say of it against the architecture."""
        import h5py

        datasets: dict[str, Any] = {}
        for file in self._files.values():

            def note(name: str, found: Any, file: Any = file) -> None:
                if isinstance(found, h5py.Dataset):
                    # Files of keras-hub's first presets call the list of layers by an internal name.
                    datasets[name.replace("_layer_checkpoint_dependencies/", "layers/", 1)] = (file, name)

            file.visititems(note)
        for path, (name, shape) in stored_weights(architecture).items():
            file, stored_as = datasets.pop(name, (None, name))
            if file is None:
                # A link is not visited, and would lead out of the file.
                file = next((each for each in self._files.values() if name in each), None)
            if file is None:
                raise StageError(
                    "The preset's weight files must hold every weight of its architecture. "
                    f"Received: none for {path}. Fetch the preset again: `python -m stages.fetch`."
                )
            self._found[path] = dataset = _own(file, stored_as)
            if dataset.shape != shape:
                raise StageError(
                    f"A weight must have the shape that the preset's architecture gives it: {path} {shape}. "
                    f"Received: shape={dataset.shape} in the file."
                )
            _refuse_codes(dataset, path)
        _refuse_shared(self._found)
        if strange := next((name for name in datasets if not SEEDS.fullmatch(f"/{name}")), None):
            raise StageError(
                "The preset's weight files hold a weight that its architecture does not have. "
                f"Received: {shown(strange)} in {datasets[strange][0].filename}"
            )

    def __enter__(self) -> KerasWeights:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight, in the file's dtype; only that slice is read.

        Raises:
            StageError: the file breaks off.
        """
        import ml_dtypes

        dataset = self._found[path]
        try:
            values = dataset[index]
        except (OSError, ValueError) as error:
            raise StageError(
                f"The preset's weight files must be complete. Received: {path} cannot be read ({error}). "
                "Fetch the preset again: `python -m stages.fetch`."
            ) from error
        # HDF5 has no bfloat16: Keras writes two opaque bytes a value and notes what they are, as most presets have it.
        return values.view(ml_dtypes.bfloat16) if dataset.dtype.kind == "V" else values

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the whole weight's shape in the file."""
        return tuple(self._found[path].shape)


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


def _refuse_codes(dataset: Any, path: str) -> None:
    """Refuse values that are no floats, or that are packed: a few bytes could unfold to any size.

    Raises:
        StageError: names the weight.
    """
    from h5py import h5t

    stored, size = dataset.id.get_type(), dataset.dtype.itemsize
    plain_float = any(stored.equal(kind) for kind in (h5t.IEEE_F16LE, h5t.IEEE_F32LE, h5t.IEEE_F64LE))
    opaque = dataset.dtype.kind == "V" and size == 2 and dataset.attrs.get("dtype") == "bfloat16"
    if not plain_float and not opaque:
        raise StageError(
            f"The weights must be plain floats, not quantized. Received: {path} of {dataset.dtype} in the "
            "file.\nSave the preset before `quantize`."
        )
    if dataset.chunks or dataset.id.get_offset() is None or dataset.id.get_storage_size() != dataset.size * size:
        raise StageError(f"The weights must be stored as Keras writes them, in one piece. Received: {path} is not.")


def _refuse_shared(datasets: dict[str, Any]) -> None:
    """Refuse a file in which two weights are the same bytes, or lie beyond its end.

    Raises:
        StageError: names a weight.
    """
    ends: dict[str, int] = {}
    for path, each in sorted(datasets.items(), key=lambda item: item[1].id.get_offset()):
        file, start, size = each.file.filename, each.id.get_offset(), each.id.get_storage_size()
        if start < ends.get(file, 0) or start + size > Path(file).stat().st_size:
            raise StageError(
                f"Each weight must have bytes of its own in the file. Received: {path} at {start:,} of {file}. "
                "Fetch the preset again: `python -m stages.fetch`."
            )
        ends[file] = start + size
