"""Measures of this process, for the metrics files."""

from __future__ import annotations

import resource
import sys


def peak_host_bytes() -> int:
    """Return the largest resident memory this process has had, in bytes."""
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS (getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
