"""Leftovers in the cache folder: found by how long nothing has used them, and removed.

Purpose: checkpoints of runs that were stopped and never continued, half-written files of runs that were killed, plans
and compiled programs of other settings or versions. Downloads are kept: repeating them is expensive.
Reads and removes: below `<cache folder>`: `checkpoints/`, `plans/`, `xla/`.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from stages.core.finetune.checkpoint import lock_of

DAY = 24 * 3600  # seconds
KINDS = {"plans": "plan", "xla": "compiled program"}


@dataclass(frozen=True)
class Leftover:
    """A file or folder that can be removed: its kind, its bytes, and the seconds since it was last used."""

    path: Path
    kind: str
    size: int
    age: float


def find(cache: Path, days: float) -> list[Leftover]:
    """Return what can be removed, largest first; never checkpoints or locks of an active run.

    Args:
        cache: the cache folder.
        days: what was used within this many days is kept, except half-written checkpoints of ended runs.
    """
    found = []
    for name, kind in KINDS.items():
        for path in _entries(cache / name):
            half = path.name.startswith(".")
            found.append(_leftover(path, f"half-written {kind}" if half else kind))
    # A half-written file of an active run is younger than a day: it takes seconds.
    found = [each for each in found if each.age >= (1 if each.kind.startswith("half") else days) * DAY]
    for path in _entries(cache / "checkpoints"):
        if path.name.endswith(".lock"):
            # A lock next to its folder is removed with the folder.
            if not path.with_suffix("").exists() and _is_free(path.with_suffix("")):
                found.append(_leftover(path, "lock of an ended run"))
        elif path.is_dir() and _is_free(path):
            whole = _leftover(path, "checkpoints of a stopped run")
            if whole.age >= days * DAY:
                found.append(whole)
            else:
                found += [_leftover(each, "half-written checkpoint") for each in path.glob(".writing-*")]
    return sorted(found, key=lambda each: (-each.size, str(each.path)))


def remove(leftover: Leftover) -> None:
    """Remove it, unless a run has started to use its checkpoints meanwhile; if it is gone already, do nothing.

    Raises:
        OSError: it cannot be removed.
    """
    path = leftover.path
    if "checkpoint" not in leftover.kind and "lock" not in leftover.kind:
        path.unlink(missing_ok=True)
        return
    folder = path.parent if path.name.startswith(".writing-") else path.with_suffix("")
    with _held(folder) as free:
        if not free:
            return
        if path.is_dir():
            shutil.rmtree(path)
        if path.parent.name == "checkpoints":
            folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _leftover(path: Path, kind: str) -> Leftover:
    """Measure a file or folder; files that another process removes meanwhile do not count."""
    size, used = 0, 0.0
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        with contextlib.suppress(FileNotFoundError):
            status = each.stat()
            size += status.st_size if each.is_file() else 0
            used = max(used, status.st_mtime)
    return Leftover(path, kind, size, max(time.time() - used, 0.0))


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold the lock of a fingerprint's folder within the block; yield False if an active run holds it."""
    lock = lock_of(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _is_free(folder: Path) -> bool:
    """Whether no active run holds the checkpoints; the check leaves no new lock file."""
    file = folder.with_name(f"{folder.name}.lock")
    if not file.exists():
        return True
    with _held(folder) as free:
        return free
