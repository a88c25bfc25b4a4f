"""User errors: shown in one or two lines, never as a traceback.

Purpose: one type for each exit code, so that the command line needs no other knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence


class StageError(Exception):
    """A task that failed for a reason the user can fix (exit code 1).

    The message says what was expected, `Received: name=value`, and what to do.
    """

    exit_code = 1


class ParamsError(StageError):
    """A wrong setting or a wrong call (exit code 2, click's own code for usage)."""

    exit_code = 2


def shown(value: object, limit: int = 200) -> str:
    """Return a value for a message: on one line, control characters escaped, at most `limit` characters and a note."""
    text = str(value)
    escaped = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text[:limit])
    return escaped if len(text) <= limit else f"{escaped}... ({len(text):,} characters)"


def shown_list(values: Sequence[object], limit: int = 20) -> str:
    """Return values for a message, separated by commas: at most `limit` of them, each at most 40 characters."""
    more = [f"and {len(values) - limit:,} more"] if len(values) > limit else []
    return ", ".join([*(shown(value, 40) for value in values[:limit]), *more])
