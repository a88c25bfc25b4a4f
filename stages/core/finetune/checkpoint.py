"""Checkpoints of a training run: written in the background by all processes, atomically; the newest few are kept.

Purpose: a run that is killed at any moment resumes from its last checkpoint. They are in the cache folder, since DVC
deletes a stage's outs before it runs it.
Reads and writes: `<cache folder>/checkpoints/<fingerprint>/step-00000050/`, which holds
    arrays-00000-of-00002.safetensors   parts of weights, optimizer variables and metrics, a file each process
    state.json                          the layout they were written on; the curve so far, validations, samples
    SHA256SUMS                          digests of these, as `sha256sum --check` reads them
and next to these folders run.json (see `fingerprint`).

At a step's boundary a process copies the parts that it writes to the host, and a thread writes them during the next
steps, into a folder with a name that is not looked for. Each reports its digest to the first process, which adds the
rest and renames the folder. Where the processes share no folder, the first gathers all at the boundary and writes
alone.

Why not Orbax: it keeps no digest, so a damaged checkpoint is found when it is half restored, if ever; it goes over to
another folder by barriers of JAX's own, in which processes would wait for one whose disk is full; and it adds a dozen
packages, TensorStore among them, to every installation. What it would save is the few hundred lines of `pieces`,
`shards` and this module, whose files any safetensors reader opens.
"""

from __future__ import annotations

import errno
import json
import logging
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stages.core.common.paths import cache_folder
from stages.core.files import flush, optional, sha256
from stages.core.finetune.pieces import Piece, write_pieces
from stages.core.processes.group import current

logger = logging.getLogger(__name__)

STATE, SUMS, WRITING = "state.json", "SHA256SUMS", ".writing-"
# Sums over an epoch's batches, which show in a line and change no weight.
METRIC = "metric/"


class Store:
    """The checkpoints of one run, identified by its fingerprint; one run at a time holds them.

    Attributes:
        folder: of the checkpoints.
        layout: what the run is laid out on; each checkpoint holds it.
        writers: how many of the processes, the first ones, reach the folder; of several only the first until they have
            met (`resuming.newest`).
        saved: the newest step that is kept, None: none; on the first process.
        not_finite: step and array of a checkpoint that was not kept, since this process found NaN or Inf in it.
    """

    def __init__(self, fingerprint: str, keep: int, layout: Mapping[str, Any] | None = None) -> None:
        """Name the folder; nothing is made yet.

        Args:
            fingerprint: from `fingerprint.fingerprint_of`.
            keep: how many of the newest to keep, at least 1.
            layout: what JSON can hold.
        """
        self.folder = cache_folder() / "checkpoints" / fingerprint
        # As it comes back from a file, to be compared.
        self.layout: dict[str, Any] = json.loads(json.dumps(dict(layout or {})))
        self.writers = 1
        self.saved: int | None = None
        self.not_finite: tuple[int, str] | None = None
        self.token = secrets.token_hex(4)
        self._keep = keep
        self._lock = lock_of(self.folder)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

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

    def save(self, step: int, pieces: Sequence[Piece], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint and return; what is still being written of the one before is waited for.

        A checkpoint that cannot be written costs a warning, and the older ones stay as they were.

        Args:
            step: steps done.
            pieces: of all arrays, those that this process writes; they may not change any more.
            state: what JSON can hold; the first process's counts.
        """
        self.finish()
        if current().index < self.writers:
            content = {"layout": self.layout, "state": dict(state)}
            self._thread = threading.Thread(target=self._write, args=(step, pieces, content), daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait until this process writes nothing any more; on the first process until the checkpoint is kept or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def newest_saved(self) -> int | None:
        """Wait for what is being written, and return the newest step that is kept, the same on all processes."""
        self.finish()
        return current().share(self.saved)

    def sweep(self) -> None:
        """Remove what killed runs have left half-written; to be called while no other run is active."""
        for left in self.folder.glob(f"{WRITING}*"):
            shutil.rmtree(left, ignore_errors=True)

    def clear(self) -> None:
        """Remove all checkpoints of the run, half-written ones too, and let the next run of its settings begin."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock.is_locked:
            # A run that waits sees that the file it has open is gone, and takes the lock of a new one.
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release(force=True)

    def found(self) -> list[Path]:
        """Return the checkpoints' folders, the newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _write(self, step: int, pieces: Sequence[Piece], content: Mapping[str, Any]) -> None:
        """Write this process's file and report it; on the first process complete the checkpoint."""
        group = current()
        folder = self.folder / f"{WRITING}{self.token}-{step:08d}"
        topic = f"checkpoint {self.token} {step}"
        try:
            try:
                report = self._write_own(folder, step, pieces)
            except OSError as error:
                report = {"failed": [error.errno, error.strerror or str(error), error.filename or str(self.folder)]}
            group.report(topic, report)
            if group.first:
                self._complete(step, folder, content, group.reports(topic, self.writers))
        except Exception as error:
            self._error = error
            group.report(topic, {"failed": [None, str(error), None]})

    def _write_own(self, folder: Path, step: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Write this process's file, and return what the first process is to know of it."""
        for piece in pieces:
            if not piece.name.startswith(METRIC) and not piece.finite:
                self.not_finite = (step, piece.name)
                return {"not_finite": piece.name}
        folder.mkdir(parents=True, exist_ok=True)
        name = f"arrays-{current().index:05d}-of-{self.writers:05d}.safetensors"
        digest = write_pieces(folder / name, pieces)
        flush(folder / name)
        return {"name": name, "sha256": digest}

    def _complete(
        self, step: int, folder: Path, content: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add the rest to the processes' files and name the folder, if all of them are whole; else remove it.

        Everything is on the disk before the folder gets its name, so that the power may fail too.
        """
        try:
            with optional(f"the checkpoint after step {step} is not kept"):
                for number, report in enumerate(reports):
                    if "failed" in report:
                        code, reason, file = report["failed"]
                        raise OSError(code, f"{reason} on process {number}" if number else reason, file)
                if not any("not_finite" in report for report in reports):
                    self._name(step, folder, content, {each["name"]: each["sha256"] for each in reports})
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for old in self.found()[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _name(self, step: int, folder: Path, content: Mapping[str, Any], sums: dict[str, str]) -> None:
        (folder / STATE).write_text(json.dumps(content), encoding="utf-8")
        sums[STATE] = sha256(folder / STATE)
        (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")
        for name in (STATE, SUMS, "."):
            flush(folder / name)
        target = self.folder / f"step-{step:08d}"
        if target.exists():
            # A damaged one that could not be removed.
            shutil.rmtree(target)
        folder.rename(target)
        flush(self.folder)
        self.saved = step


def lock_of(folder: Path) -> FileLock:
    """Return the lock of a fingerprint's folder: a file next to it, one per process."""
    return FileLock(folder.parent / f"{folder.name}.lock", is_singleton=True)
