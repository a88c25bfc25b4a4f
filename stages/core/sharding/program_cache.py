"""Compiled programs kept between runs: each with a digest, written whole or not at all, none needed.

Purpose: JAX writes an entry in place and never replaces one, so that what a killed run or a full disk left would cost
each later run a warning and a compilation. This is the one place that reaches into JAX's cache of programs.
Reads and writes: `<cache folder>/xla/<key>.program`.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from stages.core.files import optional, read_kept, write_kept

logger = logging.getLogger(__name__)

SUFFIX = ".program"
WORTH_KEEPING = 0.1
"""Seconds of compilation from which a program is kept: a run makes some of these, and very many below."""


class ProgramCache(CacheInterface):
    """What JAX asks for programs by key, over `read_kept` and `write_kept`."""

    def __init__(self, folder: Path) -> None:
        """Keep programs in a folder."""
        self._path = folder

    def get(self, key: str) -> bytes | None:
        """Return a program as JAX packed it, or None if there is none that is whole."""
        with optional("a compiled program cannot be read"):
            try:
                return read_kept(self._path / f"{key}{SUFFIX}")
            except ValueError:
                logger.warning("a compiled program in the cache folder is damaged; it is compiled anew.")
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keep a program, in place of a damaged one if there is any."""
        with optional("a compiled program is not kept for later"):
            write_kept(self._path / f"{key}{SUFFIX}", value)


def keep_programs(folder: Path) -> None:
    """Let JAX keep compiled programs in a folder from now on; if it cannot be written to, one line says so."""
    import jax

    with optional("compiled programs are not kept for later"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        compilation_cache.get_file_cache = lambda path: (ProgramCache(Path(path)), path)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
