"""A preset folder, keras-hub's or Hugging Face's: the check that it is one, and the list of its files.

Purpose: stop before hours of work on a folder that no stage could load.
Reads: the folder. Writes: nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stages.core.architecture import Architecture
from stages.core.errors import ParamsError, StageError, shown
from stages.core.fetch_check import Check
from stages.core.paths import own_path
from stages.core.presets import LICENCE, Manifest, PresetFile, sha256_with_progress

VOCABULARY = "assets/tokenizer/vocabulary.spm"
HUGGING_FACE_VOCABULARY = "tokenizer.model"
KERAS = ("keras", "keras_hub", "keras_nlp")  # keras-hub was keras-nlp when the first presets were written
WANTED = "A preset folder as keras-hub's save_to_preset writes it was expected"


def fetch_local(preset: str, path: str, root: Path) -> Manifest:
    """Describe a preset folder of the person's own, which stays where it is.

    Args:
        preset: a label.
        path: the folder as written in `fetch.path`, absolute or relative to `root`.
        root: the repository's folder.

    Raises:
        ParamsError: the folder does not exist or is not a preset.
    """
    folder = local_folder(path, root)
    file_format = folder_format(folder)
    return Manifest(preset, "path", file_format, None, path, LICENCE, list_files(folder))


def check_local(preset: str, path: str, root: Path) -> Check:
    """Tell whether a folder of the person's own is a preset: nothing is downloaded from there.

    Args:
        preset: a label.
        path: the folder as written in `fetch.path`, absolute or relative to `root`.
        root: the repository's folder.

    Raises:
        ParamsError: it does not exist or is not a preset.
    """
    folder = local_folder(path, root)
    folder_format(folder)
    return Check("path", f"{preset} ({path})", None, None, None, True, 0, shutil.disk_usage(folder).free)


def local_folder(path: str, root: Path) -> Path:
    """Return the folder that `fetch.path` names, absolute or relative to `root`.

    Raises:
        ParamsError: it does not exist.
    """
    folder = own_path(root, "fetch.path", path)
    if not folder.is_dir():
        raise ParamsError(f"fetch.path must name a folder that exists. Received: fetch.path={shown(path)}")
    return folder


def folder_format(folder: Path) -> str:
    """Check that a folder holds a preset, and return the manifest's format: `keras` or `safetensors`.

    Raises:
        ParamsError: it holds neither a keras-hub preset nor a Hugging Face checkpoint of a text Gemma, or half of one.
    """
    # What tells a Hugging Face configuration: Keras writes a class_name instead.
    if "model_type" not in _config(folder):
        check_keras_folder(folder)
        return "keras"
    check_safetensors_folder(folder)
    return "safetensors"


def check_safetensors_folder(folder: Path) -> None:
    """Check that a folder holds a Hugging Face checkpoint of a text Gemma, each file of it, with its vocabulary.

    Raises:
        ParamsError: names what is missing.
    """
    from stages.core.safetensors_weights import INDEX, read_architecture, shard_files

    try:
        read_architecture(folder)
        missing = [name for name in shard_files(folder) if not (folder / name).is_file()]
    except StageError as error:
        raise ParamsError(f"fetch.path: {error}") from error
    if missing:
        raise ParamsError(f"Every file that {INDEX} names must be in {folder}. Missing: {', '.join(missing)}")
    if not (folder / HUGGING_FACE_VOCABULARY).is_file():
        raise ParamsError(
            f"A Hugging Face folder must hold {HUGGING_FACE_VOCABULARY}, the SentencePiece vocabulary. "
            f"Received: {folder} holds {_listing(folder)}"
        )


def check_keras_folder(folder: Path) -> None:
    """Check that a folder holds a keras-hub preset: a text Gemma's configuration, weights (each shard), vocabulary.

    Raises:
        ParamsError: names what is missing, or what does not belong there.
    """
    _check_gemma(_config(folder), folder / "config.json")
    index = folder / "model.weights.json"
    if index.is_file():
        missing = [name for name in _shards(index) if not (folder / name).is_file()]
        if missing:
            raise ParamsError(f"{WANTED}, with every shard that {index.name} names. Missing: {', '.join(missing)}")
    elif not (folder / "model.weights.h5").is_file():
        raise ParamsError(
            f"{WANTED}, with model.weights.h5, or model.weights.json and its shards. "
            f"Received: {folder} holds {_listing(folder)}"
        )
    if not (folder / VOCABULARY).is_file():
        raise ParamsError(f"{WANTED}, with {VOCABULARY}. Received: {folder} holds none")


def _check_gemma(config: dict[str, Any], path: Path) -> None:
    """Check that a configuration is a text Gemma's, and names no class from elsewhere.

    No stage makes objects out of a configuration; one that asks for foreign classes was meant for a program that does.
    """
    try:
        Architecture(config["class_name"], dict(config["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ParamsError(
            f"{path} must hold the class_name and config of a backbone. Received: keys {', '.join(config)}"
        ) from error
    except StageError as error:
        raise ParamsError(f"{path}: {error}") from error
    waiting: list[Any] = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.values()
            named = (part.get("class_name"), part.get("module"), part.get("registered_name"))
            origins = [str(name).split(">")[0].split(".")[0] for name in named[1:] if name and ("class_name" in part)]
            if named[0] == "__lambda__" or any(origin not in KERAS for origin in origins):
                shown = ", ".join(str(name) for name in named if name is not None)
                raise ParamsError(f"{path} must name classes of Keras and keras-hub only. Received: {shown}")
        elif isinstance(part, list):
            waiting += part


def list_files(folder: Path) -> tuple[PresetFile, ...]:
    """Return every file below a folder, hashed, sorted by name; what begins with a point is passed over."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return tuple(
        PresetFile(name, (folder / name).stat().st_size, sha256_with_progress(folder / name)) for name in names
    )


def _config(folder: Path) -> dict[str, Any]:
    """Return the folder's configuration, which both kinds of preset call config.json."""
    config = folder / "config.json"
    if not config.is_file():
        raise ParamsError(
            f"{WANTED}, or a Hugging Face folder, with a config.json. Received: {folder} holds {_listing(folder)}"
        )
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ParamsError(f"{config} must be JSON. Received: {error}") from error
    if not isinstance(read, dict):
        raise ParamsError(f"{config} must be a JSON object. Received: {type(read).__name__}")
    return read


def _shards(index: Path) -> list[str]:
    """Return the file names that a sharded checkpoint's index points to, each once, sorted.

    Keras writes one name or a list of names for each layer.
    """
    try:
        targets = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParamsError(
            f"{index} must be the index that Keras writes, with a weight_map. Received: {error}"
        ) from error
    names = sorted({name for target in targets for name in ([target] if isinstance(target, str) else target)})
    if outside := [name for name in names if Path(name).name != name]:
        raise ParamsError(f"{index} must name files beside it. Received: {outside[0]}")
    return names


def _listing(folder: Path) -> str:
    """Return the first names in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"
