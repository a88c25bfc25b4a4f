"""Checkpoints of a training run: written atomically, and only the newest few are kept.

Purpose: a run that is killed at any moment resumes from its last checkpoint. They are in the cache folder, since DVC
deletes a stage's outs before it runs it.
Reads and writes: `<cache folder>/checkpoints/<fingerprint>/step-00000050/`, which holds
    arrays.safetensors   weights, optimizer variables, metric accumulators
    state.json           the rest: the curve so far, validations, samples
    SHA256SUMS           digests of the two, as `sha256sum --check` reads them
and next to these folders run.json (see `fingerprint`).
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors.numpy import load_file

from stages.core.common.paths import cache_folder
from stages.core.files import flush, optional, read_json, sha256
from stages.core.load.arrays import write_arrays
from stages.core.processes.group import current

logger = logging.getLogger(__name__)

ARRAYS, STATE, SUMS = "arrays.safetensors", "state.json", "SHA256SUMS"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step."""

    step: int
    arrays: dict[str, np.ndarray]
    state: dict[str, Any]


class Store:
    """The checkpoints of one run, identified by its fingerprint; one process at a time holds them."""

    def __init__(self, fingerprint: str, keep: int) -> None:
        """Name the folder; nothing is made yet.

        Args:
            fingerprint: from `fingerprint.fingerprint_of`.
            keep: how many of the newest to keep, at least 1.
        """
        self.folder = cache_folder() / "checkpoints" / fingerprint
        self._keep = keep
        self._lock = lock_of(self.folder)

    def hold(self) -> None:
        """Wait until no other run of the same fingerprint is active, and block such runs until `clear` or the end.

        The system drops the lock of a process that ends, however it ends.
        """
        with optional("two concurrent runs of these settings may disturb each other's checkpoints"):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                logger.info("Another run of the same settings, data and code is active; waiting for it.")
                self._lock.acquire()
            except NotImplementedError as error:  # filelock's error on a file system without locks
                raise OSError(errno.ENOLCK, "the file system has no locks", str(self.folder.parent)) from error

    def save(self, step: int, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Write a checkpoint and remove the oldest beyond `keep`.

        Everything is on the disk before the folder gets its name, so that the power may fail too.

        Args:
            step: steps done.
            arrays: by name.
            state: what JSON can hold.

        Raises:
            OSError: it could not be written; the older ones are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder))
        try:
            write_arrays(temporary / ARRAYS, arrays)
            (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
            sums = "".join(f"{sha256(temporary / name)}  {name}\n" for name in (ARRAYS, STATE))
            (temporary / SUMS).write_text(sums, encoding="utf-8")
            for name in (ARRAYS, STATE, SUMS, "."):
                flush(temporary / name)
            target = self.folder / f"step-{step:08d}"
            if target.exists():
                # A damaged one that could not be removed.
                shutil.rmtree(target)
            temporary.rename(target)
            flush(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self._found()[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, or None; damaged ones are removed, with a warning."""
        for folder in self._found():
            try:
                return self._read(folder)
            except (OSError, ValueError) as error:
                logger.warning(f"the checkpoint {folder.name} is damaged and not used ({error}).")
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def clear(self) -> None:
        """Remove all checkpoints of the run, half-written ones too, and let the next run of its settings begin."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock.is_locked:
            # A run that waits sees that the file it has open is gone, and takes the lock of a new one.
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release(force=True)

    def _found(self) -> list[Path]:
        """The checkpoints' folders, the newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _read(self, folder: Path) -> Checkpoint:
        lines = (line.split("  ", 1) for line in (folder / SUMS).read_text("utf-8").splitlines())
        sums = {name: digest for digest, name in lines}
        for name in (ARRAYS, STATE):
            if sums.get(name) != sha256(folder / name):
                raise ValueError(f"{name} does not have its SHA-256")
        step = int(folder.name.removeprefix("step-"))
        return Checkpoint(step, load_file(folder / ARRAYS), read_json(folder / STATE))


def newest_of_first(store: Store) -> Checkpoint | None:
    """Return the newest whole checkpoint that the first process has, after waiting for other runs like this one.

    The arrays are on the first process alone: the others may have no access to its folder, and take them from it.
    """
    group = current()
    found = None
    if group.first:
        store.hold()
        found = store.newest()
    told = group.share({"step": found.step, "state": found.state} if found else None)
    return found or (told and Checkpoint(told["step"], {}, told["state"]))


def lock_of(folder: Path) -> FileLock:
    """Return the lock of a fingerprint's folder: a file next to it, one per process."""
    return FileLock(folder.parent / f"{folder.name}.lock", is_singleton=True)
