"""Importing TensorFlow without the notes that its C++ libraries print.

Purpose: TF_CPP_MIN_LOG_LEVEL does not silence what is printed before TensorFlow's logging starts, so the file
descriptor itself is redirected within the block.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_standard_error() -> Iterator[None]:
    """Hold back what the block and its libraries write to standard error; show it only if the block fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        original = os.dup(2)
        os.dup2(kept.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
            if failed:
                kept.seek(0)
                sys.stderr.write(kept.read().decode(errors="replace"))
