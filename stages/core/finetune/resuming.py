"""Finding the newest whole checkpoint of a run, by all its processes together.

Purpose: a checkpoint may be of another number of processes or another mesh than reads it. The processes that reach its
folder share the work of checking its digests, and take from it what they need.
Reads: `<cache folder>/checkpoints/<fingerprint>/step-*/` (see `checkpoint`).
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.files import optional, read_json, sha256
from stages.core.finetune.checkpoint import STATE, SUMS, Store
from stages.core.finetune.pieces import PieceFiles
from stages.core.processes.group import current

logger = logging.getLogger(__name__)

ARRAYS = re.compile(r"arrays-(\d{5})-of-(\d{5})\.safetensors")
# Seconds within which a file of one process shows on another's view of a folder that they share.
SHOWS = 5.0


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step.

    `files` are None on a process that does not reach the folder; `read_by_all` says whether none is such.
    """

    step: int
    layout: Mapping[str, Any]
    state: dict[str, Any]
    files: PieceFiles | None
    read_by_all: bool


def newest(store: Store) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None, after waiting for other runs like this one.

    Damaged ones are removed, with a warning. To be called by all processes once, before anything is saved.
    """
    group = current()
    if group.first:
        store.hold()
        store.sweep()
    _meet(store)
    for name in group.share([each.name for each in store.found()] if group.first else None):
        folder = store.folder / name
        problem = _problem_of(folder, store.writers)
        if problem is None:
            step = int(name.removeprefix("step-"))
            told = group.share({"step": step, **read_json(folder / STATE)} if group.first else None)
            files = PieceFiles(folder.glob("arrays-*")) if group.index < store.writers else None
            store.saved = step
            return Checkpoint(**told, files=files, read_by_all=store.writers == group.count)
        if group.first:
            logger.warning(f"the checkpoint {name} is damaged and not used ({problem}).")
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _meet(store: Store) -> None:
    """Find out whether all processes reach the first one's folder, by a file that it makes."""
    group = current()
    if group.count == 1:
        return
    store.token = group.share(store.token)
    file = store.folder / f".shared-{store.token}"
    if group.first:
        with optional("checkpoints cannot be kept"):
            store.folder.mkdir(parents=True, exist_ok=True)
            file.touch()
    group.share()
    deadline = time.monotonic() + SHOWS
    while not (there := _is_there(file)) and time.monotonic() < deadline:
        time.sleep(0.2)
    group.report(file.name, there)
    shared = group.share(all(group.reports(file.name, group.count)) if group.first else None)
    store.writers = group.count if shared else 1
    if group.first:
        with optional("a file is left among the checkpoints"):
            file.unlink(missing_ok=True)


def _is_there(file: Path) -> bool:
    """Whether a file exists in a folder that this process may look into."""
    try:
        return file.exists()
    except OSError:
        return False


def _problem_of(folder: Path, readers: int) -> str | None:
    """Return what is wrong with a checkpoint, or None, the same on all processes; each reader checks some files."""
    group = current()
    if group.index < readers:
        try:
            _check(folder, group.index, readers)
            problem = None
        except (OSError, ValueError) as error:
            problem = str(error)
        group.report(f"digests of {folder.name}", problem)
    found = group.reports(f"digests of {folder.name}", readers) if group.first else []
    return group.share(next((each for each in found if each is not None), None))


def _check(folder: Path, index: int, readers: int) -> None:
    """Check that all files are there, and every `readers`-th one from `index` on by its digest.

    Raises:
        OSError: a file cannot be read.
        ValueError: one is missing or changed.
    """
    lines = (line.split("  ", 1) for line in (folder / SUMS).read_text("utf-8").splitlines())
    sums = {name: digest for digest, name in lines}
    arrays = [found for name in sums if (found := ARRAYS.fullmatch(name))]
    if not arrays or {int(each[1]) for each in arrays} != set(range(int(arrays[0][2]))) or STATE not in sums:
        raise ValueError(f"{SUMS} does not name all files")
    for name in sorted(sums)[index::readers]:
        if sums[name] != sha256(folder / name):
            raise ValueError(f"{name} does not have its SHA-256")
