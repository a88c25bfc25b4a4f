"""Graceful shutdown: a signal is recorded, and the run stops itself where nothing is lost.

Purpose: a preemptible machine sends SIGTERM some seconds before it shuts down; a user presses Ctrl-C.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from stages.core.common.errors import StageError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(StageError):
    """The run stopped because of a signal; the exit code is a shell's for it (128 + its number)."""

    def __init__(self, message: str, number: int) -> None:
        """Keep the signal's number in the exit code."""
        super().__init__(message)
        self.exit_code = 128 + number


class Interruption:
    """Within the block the first SIGTERM or SIGINT is only recorded; a second one acts as usual."""

    def __init__(self, *, enabled: bool = True) -> None:
        """Prepare to record signals; if not enabled, signals act as usual."""
        self._enabled = enabled
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        """Take over both signals."""
        if self._enabled:
            self._before = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore their handlers."""
        self._restore()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
