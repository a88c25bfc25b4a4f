"""Atomic writes, JSON, and hashes of files.

Purpose: every output of every stage goes through here (temporary file next to the target, then rename), and a cache
that cannot be written never ends a run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# A full disk, a used-up quota, a file larger than is allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What some file systems answer to being asked to put a file or folder on the disk.
NOT_FLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EISDIR)


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to `target`, renamed to it if the block succeeds and deleted if not.

    What was written is on the disk before the rename, so that the power may fail too. The temporary name keeps the
    target's suffix, since some writers choose their format by it.

    Raises:
        OSError: it could not be written; `filename` is set, to `target` where the system named no other.
    """
    temporary = target.parent / f".{target.stem[:100]}.{secrets.token_hex(6)}{target.suffix}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Made as any other file of the user's: the system takes the umask off.
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        yield temporary
        # Some writers put a file of their own in its place, a private one.
        temporary.chmod(mode)
        flush(temporary)
        temporary.replace(target)
        flush(target.parent)
    except OSError as error:
        # `write` and `fsync` name no file; the temporary one's name means nothing to a user.
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(target), None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk, if the file system supports it.

    Raises:
        OSError: the disk did not take it.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NOT_FLUSHED:
            raise


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Within the block a file that cannot be read or written is a warning of one line: the run does not need it.

    Args:
        what: what is lost then, to begin the sentence.
    """
    try:
        yield
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        logger.warning(
            f"{what} ({error.strerror or error}{place}). The run continues; GEMMA_TUNING_CACHE can name another folder."
        )


def explain(error: OSError) -> str:
    """Return two lines for a file or folder that could not be read or written, whichever stage wanted it."""
    place = error.filename2 or error.filename or "a file or folder"
    if error.errno in FULL:
        return (
            f"The disk must have room for {place}. Received: {error.strerror}\n"
            "Make room (`python -m stages.cache` shows what can go), or write elsewhere with --out-root."
        )
    return (
        f"It must be possible to read and write {place}. Received: {error.strerror}\n"
        "Correct its owner and mode (`ls -ld` shows them), or write elsewhere: --out-root for a stage's outputs, "
        "GEMMA_TUNING_CACHE for the cache folder."
    )


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, content: Any) -> None:
    """Write JSON atomically: two spaces, keys in the order given, one newline at the end."""
    write_text(target, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file written by `write_json`."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_kept(target: Path, content: bytes) -> None:
    """Write what is kept for later runs, with its SHA-256 before it, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_kept(path: Path) -> bytes | None:
    """Return what `write_kept` wrote, or None if nothing is there, and note the file as used now.

    Raises:
        ValueError: the file is not as it was written.
        OSError: it cannot be read.
    """
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if digest != hashlib.sha256(content).hexdigest().encode():
        raise ValueError(f"{path} does not have its SHA-256")
    with contextlib.suppress(OSError):
        os.utime(path)
    return content


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
