"""Being told to stop: a signal is noted, the run stops itself where nothing is lost.

Purpose: a preemptible machine sends SIGTERM some seconds before it goes; a person presses Ctrl-C.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from stages.core.common.errors import StageError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(StageError):
    """The run stopped because it was told to; the exit code is a shell's for the signal (128 + its number)."""

    def __init__(self, message: str, number: int) -> None:
        """Keep the signal's number in the exit code."""
        super().__init__(message)
        self.exit_code = 128 + number


class Interruption:
    """Within the block the first SIGTERM or SIGINT is only noted; a second one acts as if there were no block."""

    def __init__(self) -> None:
        """Note nothing yet."""
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        """Take over both signals."""
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
