"""A progress bar over bytes on standard error, disabled if that is not a terminal.

Purpose: one style of progress for downloads, joins and hashes of large files.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


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
