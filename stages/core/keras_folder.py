"""A keras-hub preset folder: the check that it is one, and the list of its files.

Purpose: stop before hours of work on a folder that no stage could load.
Reads: the folder. Writes: nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from stages.core.errors import ParamsError
from stages.core.presets import LICENCE, Manifest, PresetFile, sha256_with_progress

VOCABULARIES = ("assets/tokenizer/vocabulary.spm", "tokenizer.model")


def fetch_local(preset: str, path: str, root: Path) -> Manifest:
    """Describe a preset folder of the person's own, which stays where it is.

    Args:
        preset: a label.
        path: the folder as written in `fetch.path`, absolute or relative to `root`.
        root: the repository's folder.

    Raises:
        ParamsError: the folder does not exist or is not a preset.
    """
    folder = root / Path(path).expanduser()
    if not folder.is_dir():
        raise ParamsError(f"fetch.path must name a folder that exists. Received: fetch.path={path}")
    check_keras_folder(folder)
    return Manifest(preset, "path", "keras", None, path, LICENCE, list_files(folder))


def check_keras_folder(folder: Path) -> None:
    """Check that a folder holds a keras-hub preset: configuration, weights (each shard of them) and vocabulary.

    Raises:
        ParamsError: names what is missing.
    """
    wanted = "A preset folder as keras-hub's save_to_preset writes it was expected"
    config = folder / "config.json"
    if not config.is_file():
        raise ParamsError(f"{wanted}, with a config.json. Received: {folder} holds {_listing(folder)}")
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ParamsError(f"{config} must be JSON. Received: {error}") from error
    if not isinstance(read, dict):
        raise ParamsError(f"{config} must be a JSON object. Received: {type(read).__name__}")
    index = folder / "model.weights.json"
    if index.is_file():
        missing = [name for name in _shards(index) if not (folder / name).is_file()]
        if missing:
            raise ParamsError(f"{wanted}, with every shard that {index.name} names. Missing: {', '.join(missing)}")
    elif not (folder / "model.weights.h5").is_file() and not list(folder.glob("*.safetensors")):
        raise ParamsError(
            f"{wanted}, with model.weights.h5, model.weights.json and its shards, or *.safetensors. "
            f"Received: {folder} holds {_listing(folder)}"
        )
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ParamsError(f"{wanted}, with {' or '.join(VOCABULARIES)}. Received: {folder} holds neither")


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
    return sorted({name for target in targets for name in ([target] if isinstance(target, str) else target)})


def _listing(folder: Path) -> str:
    """Return the first names in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"
