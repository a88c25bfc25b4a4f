"""Errors that are a person's to mend: shown in one or two lines, never as a traceback.

Purpose: one type for each exit code, so that the command line needs no other knowledge.
"""

from __future__ import annotations


class StageError(Exception):
    """A task that failed for a reason the person can mend (exit code 1).

    The message says what was expected, `Received: name=value`, and what to do.
    """

    exit_code = 1


class ParamsError(StageError):
    """A wrong setting or a wrong call (exit code 2, click's own code for usage)."""

    exit_code = 2
