"""Reading keras-hub's weight files (`model.weights.h5`, one or several) by weight path, in slices.

Purpose: Keras only offers to load a whole file into a model that already holds random numbers. This knows where in the
file each weight is, and that there is nothing else in it; `tests/load/test_weight_loading.py` holds it to what Keras
writes.
Reads: `model.weights.h5`, or `model.weights.json` and the files it names.
"""

from __future__ import annotations

import bisect
import io
import re
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import ml_dtypes
import numpy as np
from h5py import h5t

from stages.core.common.errors import StageError, shown
from stages.core.presets.architecture import Architecture
from stages.core.presets.safetensors import shards_of
from stages.core.presets.tokenizer import KERAS_VOCABULARY
from stages.core.presets.untrusted import read_object
from stages.core.presets.weight_table import weight_table

SINGLE, INDEX = "model.weights.h5", "model.weights.json"

# What a file may hold in addition to the weights: the counters of random numbers that dropout layers keep.
SEEDS = re.compile(r".*/seed_generator(_state)?/.*")
# The towers of a Gemma 4, whose weights are not read.
TOWERS = re.compile(r"/layers/gemma4_(vision|audio)_encoder/.*")

# How the structures of HDF5 begin: the file's signature, four capitals, a version 1 object header (version, reserved
# byte, number of messages, reference count 1) or its continuation (a message's type, size, flags), or a group's names.
STRUCTURE = re.compile(rb"\x89HDF|[A-Z]{4}|\x01\0..\x01\0\0\0|[\x01-\x17]\0..[\0-\x3f]\0\0\0|[a-z_\d]{4}", re.DOTALL)
LARGEST_ROOM = 1 << 16
"""Bytes of free room that are looked through for a structure; HDF5 takes room in blocks of 2 KiB."""


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the weight files: those that the index names, or the single one.

    Raises:
        StageError: the index cannot be read.
    """
    return shards_of(read_object(folder / INDEX), folder / INDEX) if (folder / INDEX).is_file() else (SINGLE,)


def needed_files(folder: Path) -> list[str]:
    """Return the names of the files that the stages read, and of no other.

    Raises:
        StageError: the index of weight files cannot be read.
    """
    weights = weight_files(folder)
    index = [] if weights == (SINGLE,) else [INDEX]
    return sorted({"config.json", KERAS_VOCABULARY, *weights, *index})


def check_weights(folder: Path, architecture: Architecture) -> None:
    """Check that the weight files hold the architecture's weights and nothing else, without reading a weight.

    Raises:
        StageError: names the weight that does not fit.
    """
    with KerasWeights(folder, architecture):
        pass


class KerasWeights:
    """The weights of a preset folder, read slice by slice; a context manager, since it keeps files open."""

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        """Open the folder's weight files, and check that they hold the architecture's weights and nothing else.

        Raises:
            StageError: no weights file, one that HDF5 cannot open, or a weight that is missing, unknown, of another
                shape, or not of plain floats; names it.
        """
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
        datasets: dict[str, Any] = {}
        for file in self._files.values():

            def note(name: str, found: Any, file: Any = file) -> None:
                if isinstance(found, h5py.Dataset):
                    # Files of keras-hub's first presets call the list of layers by an internal name.
                    datasets[name.replace("_layer_checkpoint_dependencies/", "layers/", 1)] = (file, name)

            file.visititems(note)
        for path, weight in weight_table(architecture).items():
            name, shape = weight.keras, weight.shape
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
        others = [SEEDS, TOWERS] if architecture.family.towers else [SEEDS]
        if strange := next((name for name in datasets if not any(each.fullmatch(f"/{name}") for each in others)), None):
            raise StageError(
                "The preset's weight files hold a weight that its architecture does not have. "
                f"Received: {shown(strange)} in {datasets[strange][0].filename}"
            )
        unread = {name: file[stored_as] for name, (file, stored_as) in datasets.items()}
        stored = {name: each for name, each in unread.items() if each.id.get_offset() is not None}
        _refuse_moved(self._found | stored)

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
        dataset = self._found[path]
        try:
            values = np.asarray(dataset[index])
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
    """Return a dataset of a file, whose bytes are in that very file: HDF5 could have them read from any other.

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


def _refuse_moved(datasets: dict[str, Any]) -> None:
    """Refuse a file in which a weight is not where it was written: among other bytes, beyond the end, or moved.

    HDF5 keeps no checksum of where a dataset's bytes are. But without these bytes the rest of the file must read as it
    does with them. And what follows a weight is another one, free room (zeros) or a structure of the format, which its
    first bytes show it: a weight that refers to values elsewhere has none.

    Args:
        datasets: all of the files, by name or path.

    Raises:
        StageError: names a weight, or the file.

    Source: HDF5 File Format Specification 3.0, sections II to IV (signatures, version 1 object headers).
    """
    places: dict[str, list[tuple[int, int, str]]] = {}
    for path, each in datasets.items():
        places.setdefault(each.file.filename, []).append((each.id.get_offset(), each.id.get_storage_size(), path))
    for file, found in places.items():
        size = Path(file).stat().st_size
        with Path(file).open("rb") as stream:
            end, before = 0, "the file's beginning"
            for start, count, path in [*sorted(found), (size, 0, "the file's end")]:
                if start < end or start + count > size or not _is_structure(stream, end, start):
                    raise StageError(
                        f"Each weight must be where the file was written with it. Received: {before} or {path}, at "
                        f"{start:,} of {file}, is not. Fetch the preset again: `python -m stages.fetch`."
                    )
                end, before = start + count, path
        weights = [range(start, start + count) for start, count, _ in found]
        with (
            _Blanked(file, weights) as without_weights,
            h5py.File(without_weights, "r") as blanked,
            h5py.File(file, "r") as whole,
        ):
            same = _datasets(blanked) == _datasets(whole)
        if not same:
            raise StageError(
                f"Each weight must have bytes of its own in its file. Received: one in {file} has not. "
                "Fetch the preset again: `python -m stages.fetch`."
            )


def _is_structure(stream: Any, start: int, end: int) -> bool:
    """Return whether the bytes between two places begin as HDF5's structures do, or are free room."""
    stream.seek(start)
    content = stream.read(min(end - start, LARGEST_ROOM)).lstrip(b"\0")
    return not content or STRUCTURE.match(content) is not None


def _datasets(file: Any) -> list[tuple[Any, ...]]:
    """Return what a file says of its datasets, but for their values."""
    found: list[tuple[Any, ...]] = []

    def note(name: str, each: Any) -> None:
        if isinstance(each, h5py.Dataset):
            place = each.id.get_offset(), each.id.get_storage_size()
            found.append((name, each.shape, each.dtype, *place, str(each.attrs.get("dtype"))))

    file.visititems(note)
    return found


class _Blanked(io.FileIO):
    """A file in which some places read as bytes of ones, which no structure of HDF5 is made of."""

    def __init__(self, path: str, places: list[range]) -> None:
        super().__init__(path, "rb")
        self._places = sorted(places, key=lambda place: place.start)
        self._starts = [place.start for place in self._places]

    def readinto(self, buffer: Any) -> int:
        """Read as a file does."""
        start = self.tell()
        count = super().readinto(buffer) or 0
        view = memoryview(buffer).cast("B")
        for place in self._places[max(0, bisect.bisect_right(self._starts, start) - 1) :]:
            if place.start >= start + count:
                break
            first, last = max(place.start - start, 0), min(place.stop - start, count)
            if first < last:
                view[first:last] = b"\xff" * (last - first)
        return count
