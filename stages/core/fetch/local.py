"""A preset folder, keras-hub's or Hugging Face's: the check that it is one, and the list of its files.

Purpose: stop before hours of work on a folder that no stage could load.
Reads: the folder. Writes: nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.core.common.errors import ParamsError, StageError, shown, shown_list
from stages.core.common.paths import own_path
from stages.core.fetch.check import Check
from stages.core.presets import hf_config, keras_config, keras_h5, safetensors
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import format_of
from stages.core.presets.hf_tokenizer import own_template
from stages.core.presets.manifest import LICENSE, sha256_with_progress
from stages.core.presets.tokenizer import (
    HUGGING_FACE_VOCABULARY,
    JSON_VOCABULARY,
    KERAS_VOCABULARY,
    TURNS,
    TURNS_OF_GEMMA4,
)
from stages.core.presets.untrusted import read_object, refuse_pointer
from stages.core.records.manifest import Manifest, PresetFile

logger = logging.getLogger(__name__)

KERAS = ("keras", "keras_hub", "keras_nlp")  # keras-hub was keras-nlp when the first presets were written
WANTED = "A preset folder as keras-hub's save_to_preset writes it was expected"

TOWERS = {"a vision tower": ("vision_encoder", "vision_config"), "an audio tower": ("audio_encoder", "audio_config")}
"""What a preset may have beside its text model, and the keys of configurations that state it."""

MOST_SURPLUS_ROWS = 255
"""Rows of the table without a piece: tables are padded to a multiple of 64, 128 or 256 rows."""


def fetch_local(preset: str, path: str, root: Path) -> Manifest:
    """Describe a preset folder of the user's own, which stays where it is.

    Args:
        preset: a label.
        path: the folder as written in `fetch.path`, absolute or relative to `root`.
        root: the repository's folder.

    Raises:
        ParamsError: the folder does not exist or is not a preset.
    """
    folder = local_folder(path, root)
    file_format = folder_format(folder)
    check_contents(folder, file_format)
    files = list_files(folder, format_of(file_format).needed_files(folder))
    return Manifest(
        preset=preset, source="path", format=file_format, handle=None, folder=path, license=LICENSE, files=files
    )


def check_local(preset: str, path: str, root: Path) -> Check:
    """Tell whether a folder of the user's own is a preset: nothing is downloaded from there.

    Args:
        preset: a label.
        path: the folder as written in `fetch.path`, absolute or relative to `root`.
        root: the repository's folder.

    Raises:
        ParamsError: it does not exist or is not a preset.
    """
    folder = local_folder(path, root)
    check_contents(folder, folder_format(folder))
    return Check("path", f"{preset} ({path})", None, None, None, True, 0, shutil.disk_usage(folder).free)


def local_folder(path: str, root: Path) -> Path:
    """Return the folder that `fetch.path` names, absolute or relative to `root`.

    Raises:
        ParamsError: it does not exist.
    """
    folder = own_path(root, "fetch.path", path)
    if folder.is_file():
        raise ParamsError(
            f"fetch.path must name a preset's folder, not a file in it. Received: fetch.path={shown(path)}"
        )
    if not folder.is_dir():
        raise ParamsError(f"fetch.path must name a folder that exists. Received: fetch.path={shown(path)}")
    return folder


def _refuse_others(folder: Path) -> None:
    """Refuse what people take for a model's folder, by what it is.

    Raises:
        ParamsError: names it, and what to do.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ParamsError(
            f"{shown(folder)} must be readable. Received: {error.strerror}\nMend its permissions."
        ) from error

    if other := other_kind(names):
        raise ParamsError(f"A preset's folder was expected. Received: {other[0]}, in {shown(folder)}\n{other[1]}")


def other_kind(names: Iterable[str]) -> tuple[str, str] | None:
    """Return what the files of a folder or repository are instead of a preset, and what to do; None if nothing known.

    Args:
        names: of the files, and of folders next to them.
    """
    names = set(names)
    if {"refs", "snapshots"} <= names or any(name.startswith("models--") for name in names):
        do = "Name the folder below snapshots/, or fetch the model with source: huggingface."
        return "Hugging Face's cache", do
    if "adapter_config.json" in names and not names & {safetensors.SINGLE, safetensors.INDEX}:
        return "a PEFT adapter without its model", "Merge it with PEFT's `merge_and_unload()`, and save the model."
    if names & {safetensors.SINGLE, safetensors.INDEX, keras_h5.SINGLE, keras_h5.INDEX}:
        return None
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        return f"a GGUF file ({shown(gguf[0])})", "Take the same model in safetensors or as a keras-hub preset."
    if pickles := sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))):
        do = "A pickle can run a program: save it with transformers' `save_pretrained(safe_serialization=True)`."
        return f"weights as a pickle ({shown(pickles[0])})", do
    return None


def folder_format(folder: Path) -> str:
    """Check that a folder holds a preset's files, and return the manifest's format: `keras` or `safetensors`.

    Raises:
        ParamsError: it holds neither a keras-hub preset nor a Hugging Face checkpoint of a text Gemma, or half of one.
    """
    _refuse_others(folder)
    name = config_format(_config(folder))
    {"keras": check_keras_folder, "safetensors": check_safetensors_folder}[name](folder)
    return name


def config_format(config: dict[str, Any]) -> str:
    """Return the format that a `config.json` is of; Keras writes a class_name where Hugging Face has a model_type."""
    return "safetensors" if "model_type" in config else "keras"


def check_contents(folder: Path, file_format: str) -> None:
    """Check that a preset's files fit one another: configuration, every tensor, and vocabulary; no weight is loaded.

    Raises:
        ParamsError: names what does not fit.
    """
    try:
        reader = format_of(file_format)
        for name in reader.needed_files(folder):
            refuse_pointer(folder / name)
        architecture = reader.read_architecture(folder)
        reader.check_weights(folder, architecture)
        check_vocabulary(folder, file_format, architecture)
        _check_template(folder, architecture)
        _tell_of_towers(folder)
    except ParamsError:
        raise
    except StageError as error:
        raise ParamsError(f"The preset cannot be used. {error}") from error


def _tell_of_towers(folder: Path) -> None:
    """Tell that what a preset has beside its text model is left out, and is not read."""
    config = _config(folder)
    inner = config.get("config")
    stated = config | inner if isinstance(inner, dict) else config
    towers = [name for name, keys in TOWERS.items() if any(stated.get(key) is not None for key in keys)]
    if towers:
        logger.info(f"the preset has {' and '.join(towers)}, whose weights are not read: only its text model is used.")


def check_vocabulary(folder: Path, file_format: str, architecture: Architecture) -> None:
    """Check that a preset's vocabulary is of the model's family, and of the size of its table.

    Raises:
        StageError: it is not, or cannot be read.
    """
    tokenizer = format_of(file_format).load_tokenizer(folder)
    tokenizer.check_family(architecture.class_name)
    pieces, rows = tokenizer.vocabulary_size, architecture.config["vocabulary_size"]
    if not 0 <= rows - pieces <= MOST_SURPLUS_ROWS:
        raise StageError(
            f"The vocabulary must be that of the model: as many pieces as its table has rows, or up to "
            f"{MOST_SURPLUS_ROWS} fewer. Received: {pieces:,} pieces, {rows:,} rows in {folder}"
        )


def _check_template(folder: Path, architecture: Architecture) -> None:
    """Check that a chat template beside the model is of its family, and that the model's turns are as it has them.

    Raises:
        StageError: a Gemma 4 has the template of an earlier Gemma, or the other way round.
    """
    template = own_template(folder)
    gemma4 = architecture.class_name == "Gemma4Backbone"
    own, other = (TURNS_OF_GEMMA4, TURNS) if gemma4 else (TURNS, TURNS_OF_GEMMA4)
    if other in template and own not in template:
        raise StageError(
            f"The chat template must be of the model's family, in which a turn begins with {own}. Received: one "
            f"with {other}, with a {architecture.class_name}\nTake the tokenizer's files from the checkpoint that the "
            "weights are from."
        )
    opens = "<|channel>thought\\n<channel|>" in template
    if gemma4 and own in template and opens != architecture.empty_thought:
        logger.warning(
            f"the preset's chat template has {'an' if opens else 'no'} empty thought before an answer. Google's for a "
            f"model of these layers has {'none' if opens else 'one'}, and prompts and training data are as in that."
        )


def check_safetensors_folder(folder: Path) -> None:
    """Check that a folder holds a Hugging Face checkpoint of a text Gemma, each file of it, with its vocabulary.

    Raises:
        ParamsError: names what is missing.
    """
    try:
        hf_config.read_architecture(folder)
        missing = [name for name in safetensors.weight_files(folder) if not (folder / name).is_file()]
    except StageError as error:
        raise ParamsError(f"The preset cannot be used. {error}") from error
    if missing:
        index = safetensors.INDEX
        raise ParamsError(f"Every file that {index} names must be in {folder}. Missing: {shown(', '.join(missing))}")
    if not any((folder / name).is_file() for name in (HUGGING_FACE_VOCABULARY, JSON_VOCABULARY)):
        raise ParamsError(
            f"A Hugging Face folder must hold {HUGGING_FACE_VOCABULARY}, the SentencePiece vocabulary, or "
            f"{JSON_VOCABULARY}. Received: {folder} holds {_listing(folder)}"
        )


def check_keras_folder(folder: Path) -> None:
    """Check that a folder holds a keras-hub preset: a text Gemma's configuration, weights (each shard), vocabulary.

    Raises:
        ParamsError: names what is missing, or what does not belong there.
    """
    _check_gemma(_config(folder), folder)
    try:
        missing = [name for name in keras_h5.weight_files(folder) if not (folder / name).is_file()]
    except StageError as error:
        raise ParamsError(str(error)) from error
    if missing == [keras_h5.SINGLE]:
        raise ParamsError(
            f"{WANTED}, with model.weights.h5, or model.weights.json and its shards. "
            f"Received: {folder} holds {_listing(folder)}"
        )
    if missing:
        index = keras_h5.INDEX
        raise ParamsError(f"{WANTED}, with every shard that {index} names. Missing: {shown(', '.join(missing))}")
    if not (folder / KERAS_VOCABULARY).is_file():
        raise ParamsError(f"{WANTED}, with {KERAS_VOCABULARY}. Received: {folder} holds none")


def _check_gemma(config: dict[str, Any], folder: Path) -> None:
    """Check that a configuration is a text Gemma's, and names no class from elsewhere.

    No stage makes objects out of a configuration; one that asks for foreign classes was meant for a program that does.
    """
    path = folder / "config.json"
    waiting: list[Any] = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.values()
            named = (part.get("class_name"), part.get("module"), part.get("registered_name"))
            origins = [str(name).split(">")[0].split(".")[0] for name in named[1:] if name and ("class_name" in part)]
            if named[0] == "__lambda__" or any(origin not in KERAS for origin in origins):
                received = shown_list([name for name in named if name is not None])
                raise ParamsError(f"{path} must name classes of Keras and keras-hub only. Received: {received}")
        elif isinstance(part, list):
            waiting += part
    try:
        keras_config.read_architecture(folder)
    except StageError as error:
        raise ParamsError(f"{path}: {error}") from error


def list_files(folder: Path, names: Iterable[str]) -> tuple[PresetFile, ...]:
    """Return files of a folder, by their names below it, hashed and sorted; links are followed.

    Raises:
        StageError: a file cannot be read.
    """
    try:
        return tuple(
            PresetFile(name, (folder / name).stat().st_size, sha256_with_progress(folder / name))
            for name in sorted(names)
        )
    except OSError as error:
        raise StageError(
            f"Every file of a preset must be readable. Received: {shown(error.filename)} ({error.strerror})"
        ) from error


def _config(folder: Path) -> dict[str, Any]:
    """Return the folder's configuration, which both kinds of preset call config.json."""
    if not (folder / "config.json").is_file():
        raise ParamsError(
            f"{WANTED}, or a Hugging Face folder, with a config.json. Received: {folder} holds {_listing(folder)}"
        )
    try:
        return read_object(folder / "config.json")
    except StageError as error:
        raise ParamsError(str(error)) from error


def _listing(folder: Path) -> str:
    """Return the first names in a folder, for a message."""
    try:
        names = sorted(ascii(path.name)[1:-1] for path in folder.iterdir())
    except OSError as error:
        return f"nothing that may be read ({error.strerror})"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"
