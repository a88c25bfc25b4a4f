"""Disk space, permission and locks: whether a download can be written, and by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from stages.core.common.errors import StageError
from stages.core.common.sizes import megabytes
from stages.core.files import FULL

logger = logging.getLogger(__name__)

MAKE_ROOM = "Make room, or set GEMMA_TUNING_CACHE to a folder on a larger disk."
UNWRITTEN = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP)
OTHER_FOLDER = "Set GEMMA_TUNING_CACHE to a folder of your own."


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what the system says of a folder or file in the cache that cannot be written into two lines.

    Raises:
        StageError: it could not.
    """
    try:
        yield
    except OSError as error:
        raise StageError(explain_unwritten(error, place)) from error


def explain_unwritten(
    error: OSError, place: Path | str, make_room: str = MAKE_ROOM, other_folder: str = OTHER_FOLDER
) -> str:
    """Return two lines for a file that could not be written.

    Args:
        error: what the system said.
        place: the file or folder.
        make_room: what to do about a full disk, one line.
        other_folder: what to do about a folder that cannot be written to, one line.
    """
    if error.errno in FULL:
        return f"The disk filled up while {place} was written ({error.strerror}).\n{make_room}"
    return f"The cache folder must be writable. Received: {error.filename or place} ({error.strerror})\n{other_folder}"


@contextlib.contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Hold a lock next to `target`, so that only one of several clones fetches it.

    The system drops the lock of a process that ends, however it ends.

    Args:
        target: the file or folder that is about to be made.

    Raises:
        StageError: the folder cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f"{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info(f"Another run is fetching {target.name}; waiting for it.")
            lock.acquire()
    except OSError as error:
        raise StageError(explain_unwritten(error, target.parent)) from error
    try:
        yield
    finally:
        lock.release()


def check_room(folder: Path, needed: int, purpose: str, remedy: str = MAKE_ROOM) -> None:
    """Stop before a download that would fill the disk.

    Args:
        folder: where the files will be; it may not exist yet.
        needed: bytes that will be written.
        purpose: what for, to follow "for".
        remedy: what to do, one line.

    Raises:
        StageError: less is free than needed.
    """
    if trouble := no_room(folder, needed, purpose, remedy):
        raise StageError(trouble)


def no_room(folder: Path, needed: int, purpose: str, remedy: str = MAKE_ROOM) -> str | None:
    """Return two lines if a disk has less room than a download needs, with the arguments of `check_room`."""
    free = free_bytes(folder)
    if free >= needed:
        return None
    return f"{megabytes(needed)} are needed in {folder} for {purpose}. Received: free={megabytes(free)}\n{remedy}"


def free_bytes(folder: Path) -> int:
    """Return the free room of the disk that a folder is on, or would be."""
    return shutil.disk_usage(_existing(folder)).free


def not_writable(folder: Path, remedy: str = OTHER_FOLDER) -> str | None:
    """Return two lines if nothing can be written to a folder, there or yet to be made."""
    existing = _existing(folder)
    if existing.is_dir() and os.access(existing, os.W_OK):
        return None
    return f"The cache folder must be writable. Received: {folder}\n{remedy}"


def _existing(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
