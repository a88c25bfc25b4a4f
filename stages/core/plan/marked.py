"""Tables that a command writes into a guide, between two marks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stages.core.common.errors import ParamsError
from stages.core.files import write_text


def write_between(file: Path, begin: str, end: str, make: Callable[[], str], option: str) -> None:
    """Write what is made between the two marks of a Markdown file; the rest of it stays.

    Args:
        file: a text file with the lines `begin` and `end`.
        begin, end: the marks.
        make: returns the text; called once the file is known to be right.
        option: of the command, which names the file.

    Raises:
        ParamsError: there is no such file, or the marks are not in it.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ParamsError(f"{option} needs a file with the marks {begin} and {end}. Received: {option}={file}")
    write_text(file, f"{before}{begin}\n{make()}\n{end}{after}")
