"""JAX's persistent compilation cache with atomic writes and a digest for each program.

Purpose: JAX writes an entry in place and never replaces one, so that a truncated entry of a killed run or a full
disk would cost each later run a warning and a compilation. Only this module uses the internals of JAX's cache.
Reads and writes: `<cache folder>/xla/<key>.program`.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from stages.core.files import optional, read_kept, write_kept

logger = logging.getLogger(__name__)

SUFFIX = ".program"
WORTH_KEEPING = 0.1
"""Seconds of compilation from which a program is kept: a run makes some of these, and very many below."""


class ProgramCache(CacheInterface):
    """JAX's cache interface, over `read_kept` and `write_kept`."""

    def __init__(self, folder: Path) -> None:
        """Keep programs in a folder."""
        self._path = folder

    def get(self, key: str) -> bytes | None:
        """Return a program as JAX packed it, or None if it is missing or damaged."""
        with optional("a compiled program cannot be read"):
            try:
                return read_kept(self._path / f"{key}{SUFFIX}")
            except ValueError:
                logger.warning("a compiled program in the cache folder is damaged and is compiled again.")
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keep a program, replacing a damaged one."""
        with optional("a compiled program is not kept for later"):
            write_kept(self._path / f"{key}{SUFFIX}", value)


def keep_programs(folder: Path) -> None:
    """Let JAX keep compiled programs in a folder from now on; if it cannot be written to, log a warning."""
    with optional("compiled programs are not kept for later"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        compilation_cache.get_file_cache = lambda path: (ProgramCache(Path(path)), path)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
