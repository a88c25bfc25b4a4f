"""How far a long step is: a bar over bytes at a terminal, a line from time to time in a log."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

SECONDS_PER_LINE = 30


class ProgressLog:
    """In a log, where no bar can move: a line every half minute with how far it is and how long it still takes.

    Example:
        >>> progress = ProgressLog("Step", total=186)
        >>> progress.show(7, "loss 3.52")  # after half a minute: "Step 7 of 186, loss 3.52, about 13 min left."
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        """Begin to count time.

        Args:
            what: is counted, one word.
            total: of them.
            done: before, by another process.
        """
        self._what, self._total, self._before = what, total, done
        self._began = self._shown = time.monotonic()

    def show(self, done: int, details: str) -> None:
        """Log a line if it is time for one and standard output is no terminal."""
        now = time.monotonic()
        if sys.stdout.isatty() or now - self._shown < SECONDS_PER_LINE or done >= self._total:
            return
        self._shown = now
        left = (now - self._began) / (done - self._before) * (self._total - done)
        logger.info(f"{self._what} {done} of {self._total}, {details}, about {left / 60:.0f} min left.")


@contextlib.contextmanager
def bytes_bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that sets how many bytes are done; the bar disappears when the block ends.

    Args:
        label: what is being done, a few words.
        total: bytes in all; None when not known.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Column

    def narrow() -> Column:
        return Column(no_wrap=True, overflow="ellipsis")

    columns = (
        TextColumn("{task.description}", table_column=narrow()),
        BarColumn(bar_width=16),
        DownloadColumn(table_column=narrow()),
        TransferSpeedColumn(table_column=narrow()),
        TimeRemainingColumn(table_column=narrow()),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)
