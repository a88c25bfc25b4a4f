"""Measures of this process, for the metrics files."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

PROCESS = Path("/proc/self")
# Highest peak before the last reset of the kernel's high-water mark.
_highest = 0


def peak_host_bytes() -> int:
    """Return the largest resident memory this process has had, in bytes."""
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS (getrusage(2)).
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(_highest, now)


class Growth:
    """Peak growth of this process's resident memory from here to `bytes`; Linux only."""

    def __init__(self) -> None:
        """Reset the kernel's high-water mark to the resident memory now (proc(5), clear_refs)."""
        global _highest
        _highest = peak_host_bytes()
        self._before: int | None = None
        with contextlib.suppress(OSError):
            (PROCESS / "clear_refs").write_text("5")
            self._before = _status("VmRSS")

    def bytes(self) -> int | None:
        """Return the growth so far, or None if the system does not report it."""
        if self._before is None:
            return None
        return max(0, _status("VmHWM") - self._before)


def _status(key: str) -> int:
    """Return a size from the process's status, in bytes."""
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"The status of a process must have {key}. Received: none")
