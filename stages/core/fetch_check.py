"""What `fetch --check` tells before anything is downloaded: whether the download would work, and what it would cost.

Purpose: one form for all sources, filled by each source's own module and shown by one function.
Reads: the disks' free room. Writes: nothing.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from stages.core.downloads import MAKE_ROOM, OTHER_FOLDER, existing_parent
from stages.core.keras_folder import folder_format, local_folder


@dataclass(frozen=True)
class Check:
    """What is known about a preset at its source.

    Attributes:
        source: as in `fetch.source`.
        preset: the preset's name and, where it has one, its handle.
        credentials: where those in use were found (never what they are); None where none were found or needed.
        user: who one is logged in as; None where that is not known or needed.
        consent: whether the licence was accepted; None where the source does not ask for it or does not tell.
        present: whether the files are here already, unaltered.
        download_bytes: what would be downloaded; None where the source does not tell.
        free_bytes: free room where the files would lie.
        notes: what the person should know besides, a line each.
        trouble: why the fetch would not work and what to do, two lines; None where it would.
    """

    source: str
    preset: str
    credentials: str | None
    user: str | None
    consent: bool | None
    present: bool
    download_bytes: int | None
    free_bytes: int
    notes: tuple[str, ...] = ()
    trouble: str | None = None


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
    return Check("path", f"{preset} ({path})", None, None, None, True, 0, free_bytes(folder))


def show(check: Check) -> str:
    """Return what a check found as lines of name and value; texts from outside lose what could steer a terminal."""
    lines = {
        "source": check.source,
        "preset": check.preset,
        "credentials": check.credentials or "none in use",
        "logged in as": check.user or "not asked or not told",
        "licence": {True: "accepted", False: "not accepted", None: "not asked or not told"}[check.consent],
        "here already": "yes" if check.present else "no",
        "download": "unknown" if check.download_bytes is None else _size(check.download_bytes),
        "free room": _size(check.free_bytes),
    } | ({"note": "; ".join(check.notes)} if check.notes else {})
    return "\n".join(f"{name:13}{_plain(value)}" for name, value in lines.items())


def free_bytes(folder: Path) -> int:
    """Return the free room of the disk that a folder is on, or would be."""
    return shutil.disk_usage(existing_parent(folder)).free


def no_room(folder: Path, needed: int, remedy: str = MAKE_ROOM) -> str | None:
    """Return two lines if a disk has less room than a download needs.

    Args:
        folder: where the files will lie.
        needed: bytes that will be written.
        remedy: what to do, one line.
    """
    free = free_bytes(folder)
    if free >= needed:
        return None
    return f"{_size(needed)} are needed in {folder}. Received: free={_size(free)}\n{remedy}"


def not_writable(folder: Path, remedy: str = OTHER_FOLDER) -> str | None:
    """Return two lines if nothing can be written to a folder, there or yet to be made."""
    existing = existing_parent(folder)
    if existing.is_dir() and os.access(existing, os.W_OK):
        return None
    return f"The cache folder must be writable. Received: {folder}\n{remedy}"


def _size(count: int) -> str:
    """Return bytes for a person."""
    return (
        f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"
    )


def _plain(text: str) -> str:
    """Return a text without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
