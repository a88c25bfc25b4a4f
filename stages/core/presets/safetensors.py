"""Reading Gemma from a Hugging Face folder (safetensors) as keras-hub names and shapes it, in slices.

Purpose: a checkpoint in the form most people hold it in. Only the slice that a device needs is read.
Reads: `config.json`, and `model.safetensors` or the files that `model.safetensors.index.json` names.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open

from stages.core.common.errors import StageError, shown
from stages.core.presets.architecture import Architecture
from stages.core.presets.hf_config import WITH_TOWERS, read_architecture, read_config
from stages.core.presets.hf_tokenizer import vocabulary_files
from stages.core.presets.untrusted import Typed, brief, parse, parse_object, read_object
from stages.core.presets.weight_table import StoredWeight, of_vault, unread_of_sharing, weight_table

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What has been read of a mapped file stays in this process's memory until the file is closed: after this many bytes.
BYTES_AN_OPENING = 1 << 26
LARGEST_HEADER = 25_000_000
"""Bytes; the format allows 100 MB, and those of the largest Gemma have about 100,000."""
# Where the text tower's tensors are, by what their names begin with; transformers has changed this over the years.
PREFIXES = ("model.", "", "model.language_model.", "language_model.model.")


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the weight files: the single one, or those that the index names.

    Raises:
        StageError: neither is there, or the index cannot be read.
    """
    if (folder / SINGLE).is_file():
        return (SINGLE,)
    if not (folder / INDEX).is_file():
        raise StageError(f"A Hugging Face folder must hold {SINGLE}, or {INDEX} with a weight_map. Received: {folder}")
    return shards_of(read_object(folder / INDEX), folder / INDEX)


def needed_files(folder: Path) -> list[str]:
    """Return the names of the files that the stages read, and of no other.

    Raises:
        StageError: the index of weight files cannot be read.
    """
    weights = weight_files(folder)
    index = [] if weights == (SINGLE,) else [INDEX]
    return sorted({"config.json", *vocabulary_files(folder), *weights, *index})


def open_weights(folder: Path, architecture: Architecture) -> contextlib.closing[SafetensorsWeights]:
    """Return the weights, for a `with` block at whose end the files are closed; config.json gives the architecture."""
    return contextlib.closing(SafetensorsWeights(folder))


def check_weights(folder: Path, architecture: Architecture) -> None:
    """Check that the weight files hold the architecture's weights and nothing else, and no language head of its own.

    Raises:
        StageError: names the tensor that does not fit.
    """
    with open_weights(folder, architecture) as weights:
        weights.check_head()


def shards_of(index: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Return the file names that an index points to, each once, sorted.

    Keras writes one name or a list of names for each layer, Hugging Face one for each tensor.

    Raises:
        StageError: it has no map, or one that names anything but files next to it.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise StageError(f"{path} must be an index with a weight_map. Received: keys {shown(', '.join(index))}")
    names = set()
    for target in weight_map.values():
        for name in target if isinstance(target, list) else [target]:
            if not isinstance(name, str) or not name or "\0" in name or Path(name).name != name:
                raise StageError(f"{path} must name files next to it. Received: {shown(name)} (which is not there)")
            names.add(name)
    if not names:
        raise StageError(f"{path} must be an index with a weight_map. Received: an empty one")
    return tuple(sorted(names))


class Stored(NamedTuple):
    """What a header says of a tensor: its shape, its dtype as the format writes it, and the file."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class _Entry(Typed):
    """What a header says of a tensor, the bytes counted from the header's end."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


def header_end(start: bytes, file: str) -> int:
    """Return where the header of a safetensors file ends, by the first 8 bytes of the file.

    Raises:
        StageError: they are fewer, or the header would be larger than the format allows.
    """
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > LARGEST_HEADER:
        raise StageError(
            f"{file} must begin with the length of a safetensors header. Received: {brief(bytes(start[:8]))}"
        )
    return 8 + length


def read_header(start: bytes, file: str, size: int | None) -> dict[str, Stored]:
    """Return the tensors that the header of a safetensors file states, by name.

    Args:
        start: the file's bytes up to `header_end`; what follows is not looked at.
        file: its name, for messages.
        size: bytes of the whole file, None where that is not known.

    Raises:
        StageError: it is no header, or one of a file of another size.

    Source: https://huggingface.co/docs/safetensors: 8 bytes with the length of the JSON that follows, then the values.
    """
    end = header_end(start, file)
    content = parse_object(start[8:end], f"The header of {file}")
    content.pop("__metadata__", None)
    entries = {
        name: parse(_Entry, entry, f"The header of {file}, tensor {brief(name)},") for name, entry in content.items()
    }
    stated = end + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if size is not None and size != stated:
        raise StageError(f"{file} must have the {stated:,} bytes that its header states. Received: {size:,} bytes")
    return {name: Stored(tuple(entry.shape), entry.dtype, file) for name, entry in entries.items()}


# What the files may hold in addition to the weights: buffers that are recomputed, and the towers of a Gemma 3 or 4.
BUFFERS = re.compile(r"(.*\.)?rotary_emb(_local)?\.(original_)?inv_freq")
OTHER_TOWERS = re.compile(r"(model\.)?(vision_tower|audio_tower|multi_modal_projector|embed_vision|embed_audio)\..*")
HEAD = re.compile(r"(.*\.)?lm_head\.weight")
PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")


def check_tensors(folder: Path, stored: Mapping[str, Stored]) -> dict[str, StoredWeight]:
    """Hold the tensors that the headers state against the configuration, and return where each weight comes from.

    Args:
        folder: with the `config.json`; the weights need not be there.
        stored: by the tensor's name.

    Raises:
        StageError: a tensor is missing, unknown, of another shape, or not of plain floats; names it.
    """
    kind, _ = read_config(folder)
    prefix = next((each for each in PREFIXES if f"{each}embed_tokens.weight" in stored), None)
    if adapter := next((name for name in stored if ".lora_" in name), None):
        raise StageError(
            f"The weights must be whole, and these are of a LoRA adapter that was not merged. "
            f"Received: {shown(adapter)}\n"
            "Merge it with PEFT's `merge_and_unload()` and save the model."
        )
    if prefix is None:
        raise StageError(
            "The weight files must hold the tensor model.embed_tokens.weight (also without model., or with "
            f"language_model. in it), and do not. Received: {_some(stored)}\n"
            "Save the model itself with transformers' `save_pretrained`, without a wrapper around it."
        )
    architecture, vault = read_architecture(folder), kind == "vaultgemma"
    table = {
        path: weight._replace(hugging_face=prefix + (of_vault(weight.hugging_face) if vault else weight.hugging_face))
        for path, weight in weight_table(architecture).items()
    }
    unread = {prefix + name for name in unread_of_sharing(architecture)}
    wanted = {weight.hugging_face for weight in table.values()}
    for path, weight in table.items():
        if (name := weight.hugging_face) not in stored:
            others = [each for each in stored if each not in wanted]
            raise StageError(
                f"The weight files must hold {name} (for {path}), and do not. Received: "
                f"{_some(difflib.get_close_matches(name, others, cutoff=0) or stored)}. "
                "Download the checkpoint again."
            )
        if stored[name].shape != weight.matrix_shape:
            raise StageError(
                f"The tensor {name} (for {path}) must have the shape {weight.matrix_shape} that config.json gives it. "
                f"Received: shape={stored[name].shape} in {stored[name].file}."
            )
    for name, found in stored.items():
        if name in wanted or HEAD.fullmatch(name):
            if found.dtype not in PLAIN_FLOATS:
                raise StageError(
                    f"The weights must be plain floats ({', '.join(PLAIN_FLOATS)}), not quantized. Received: {name} "
                    f"of {found.dtype} in {found.file}"
                )
        elif not (name in unread or BUFFERS.fullmatch(name) or (kind in WITH_TOWERS and OTHER_TOWERS.fullmatch(name))):
            raise StageError(
                f"The weight files hold a tensor that a text Gemma of this config.json does not have. "
                f"Received: {shown(name)} in {found.file}"
            )
    return table


def twice(tensor: str, *files: str) -> StageError:
    """Return the error for a tensor that is in two files."""
    return StageError(f"Each tensor must lie in one file. Received: {shown(tensor)} in {' and in '.join(files)}")


def _some(names: Iterable[str]) -> str:
    """Return the first of many names, for a message."""
    listed = sorted(names)
    return shown(", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")) or "none"


class SafetensorsWeights:
    """The weights of a Hugging Face folder under keras-hub's weight paths and in its shapes, read slice by slice."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files and check that every weight is there; no weight is read yet.

        Raises:
            StageError: a file is missing or damaged, a tensor is missing, unknown, or has another shape or dtype.
        """
        # Gives numpy the dtype bfloat16, which most checkpoints are in.
        self._folder = folder
        self._opened: tuple[str, Any] | None = None
        self._bytes_read = 0
        self._stored: dict[str, Stored] = {}
        for file in weight_files(folder):
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (the file is no mapping)
                    if name in self._stored:
                        raise twice(name, file, self._stored[name].file)
                    part = tensors.get_slice(name)
                    self._stored[name] = Stored(tuple(part.get_shape()), part.get_dtype(), file)
        self._table = check_tensors(folder, self._stored)

    def check_head(self) -> None:
        """Check that a language head in the files is the embedding table, which takes its place here.

        Raises:
            StageError: it is another: the model would give other tokens.
        """
        table = self._table["token_embedding/embeddings"].hugging_face
        for head in (name for name in self._stored if HEAD.fullmatch(name)):
            same = self._stored[head].shape == self._stored[table].shape
            rows = self._stored[table].shape[0] if same else 0
            step = max(1, BYTES_AN_OPENING // (8 * self._stored[table].shape[1]))
            for start in range(0, rows, step):
                parts = []
                for name in (head, table):
                    values = self._slices(self._stored[name].file).get_slice(name)[start : min(start + step, rows)]
                    self._bytes_read += values.nbytes
                    parts.append(values)
                same = same and np.array_equal(*parts)
            if not same:
                raise StageError(
                    f"The language head must be the embedding table, as in every Gemma. Received: {head} in "
                    f"{self._stored[head].file}, which differs from {table}\n"
                    "This project has no head of its own: it would compute other tokens than the checkpoint."
                )

    def shape(self, path: str) -> tuple[int, ...]:
        """Return a weight's Keras shape, without reading it."""
        return self._table[path].shape

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice (steps of 1) of a weight in Keras' shape and the file's dtype; only that slice is read."""
        values = self._read(path, index)
        self._bytes_read += values.nbytes
        return values

    def _read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        weight = self._table[path]
        name, shape, kind = weight.hugging_face, weight.shape, weight.kind
        stored = self._slices(self._stored[name].file).get_slice(name)
        if kind == "scalar":
            return stored[:].reshape(())
        cuts = [slice(*cut.indices(size)[:2]) for cut, size in zip(index, shape, strict=True)]
        if kind in ("scale", "vector", "rows"):
            return stored[tuple(cuts)]
        if kind == "transposed":
            return stored[cuts[1], cuts[0]].T
        if kind.startswith("experts"):
            before = shape[2] if kind == "experts_up" else 0
            return stored[cuts[0], before + cuts[2].start : before + cuts[2].stop, cuts[1]].transpose(0, 2, 1)
        # A head's rows (or columns) are together in a matrix of PyTorch's order, outputs x inputs.
        heads = range(cuts[0].start, cuts[0].stop)
        if kind == "heads_out":
            size, within, hidden = shape[2], cuts[2], cuts[1]
            parts = [stored[head * size + within.start : head * size + within.stop, hidden] for head in heads]
        else:
            size, within, hidden = shape[1], cuts[1], cuts[2]
            parts = [stored[hidden, head * size + within.start : head * size + within.stop] for head in heads]
        return np.stack(parts).transpose(0, 2, 1)

    def close(self) -> None:
        """Close the file that is open."""
        if self._opened:
            self._opened[1].__exit__(None, None, None)
            self._opened = None

    def _slices(self, file: str) -> Any:
        """Return the open file."""
        if self._opened is None or self._opened[0] != file or self._bytes_read > BYTES_AN_OPENING:
            self.close()
            self._bytes_read = 0
            self._opened = (file, self._open(file).__enter__())
        return self._opened[1]

    def _open(self, file: str) -> Any:
        """Open a file (memory-mapped)."""
        try:
            if not (self._folder / file).is_file():
                raise FileNotFoundError("no such file")
            return safe_open(self._folder / file, framework="np")
        except (OSError, SafetensorError) as error:
            raise StageError(
                f"The weights file {file} must be a complete safetensors file ({error}). Received: "
                f"folder={self._folder}. Download it again."
            ) from error
