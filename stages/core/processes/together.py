"""A stage's work as one of several processes, where the environment asks for it; else alone, as ever.

Purpose: the command line's one call. It starts the launcher, joins, compares, and sees to it that all end together.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from stages.core.common.errors import ParamsError, StageError, shown
from stages.core.processes import asked as asking
from stages.core.processes.group import ALONE, LOAD_LIMIT, current, set_current
from stages.core.processes.star import Star, exit_now

logger = logging.getLogger(__name__)

# The exit codes of a run that a signal stopped where all agreed: no failure.
SIGNALLED = 128


def launch(launcher: str | None, stage: str, arguments: list[str]) -> None:
    """Become the launcher of this stage's processes, unless there is none or it has started this one.

    Args:
        launcher: `mesh.launcher`, such as `srun --ntasks-per-node=1`.
        stage: the stage's name.
        arguments: of its command line.

    Raises:
        ParamsError: it is no command.
    """
    if not launcher or asking.LAUNCHED in os.environ or asking.asked(os.environ) is not None:
        return
    command = [*shlex.split(launcher), sys.executable, "-m", f"stages.{stage}", *arguments]
    logger.info(f"Starting {stage} by mesh.launcher: {shown(launcher)} ...")
    os.environ[asking.LAUNCHED] = "1"
    try:
        _become(command)
    except OSError as error:
        raise ParamsError(
            f"mesh.launcher must be a command that is installed here. Received: mesh.launcher={shown(launcher)} "
            f"({error.strerror})"
        ) from error


def _become(command: list[str]) -> NoReturn:
    """Replace this process by a command, which then receives its signals and whose exit code is this one's."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(command[0], command)


@contextlib.contextmanager
def joined(timeout: float, facts: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """Within the block this process is one of several, if the environment asks for it; all leave it together.

    Args:
        timeout: seconds to wait for the others, `mesh.join_timeout`.
        facts: returns what must be the same on all.

    Raises:
        StageError: they did not come, or one differs.
    """
    asked = asking.asked(os.environ, asking.hosts_of_this_slice)
    if asked is None:
        asking.must_be_joined(os.environ)
        yield
        return
    # JAX is imported here, where processes join, and not with the command line.
    from stages.core.processes import meeting, runtime

    place = runtime.place_of(asked, timeout)
    if place.count == 1:
        yield
        return
    star = meeting.meet(place.address, place.index, place.count, facts(), timeout)
    set_current(star)
    with _told(star):
        star.start()
        star.doing("the start of JAX's runtime", timeout)
        runtime.start(place, timeout)
        logger.info(f"{place.count} processes have joined ({asked.by}, {place.address}), all of the same run.")
        star.doing("loading", LOAD_LIMIT)
        _quiet(star)
        yield
        star.finish()
        runtime.stop()
    set_current(ALONE)


@contextlib.contextmanager
def _told(star: Star) -> Iterator[None]:
    """Within the block an exception is reported to all processes, which then end."""
    try:
        yield
    except StageError as error:
        if error.exit_code > SIGNALLED:
            star.finish()
        else:
            star.fail(shown(str(error).splitlines()[0], 500), True)
        raise
    except BaseException as error:
        # What the system refuses, such as a full disk, is certain too.
        certain = isinstance(error, OSError | KeyboardInterrupt | MemoryError)
        star.fail(shown(f"{type(error).__name__}: {error}".splitlines()[0], 500), certain)
        raise


def _quiet(star: Star) -> None:
    """Leave the tables, progress and notes to the first process; the others show warnings and errors."""
    if not star.first:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
        logging.getLogger("stages").setLevel(logging.WARNING)


def leave(code: Any) -> None:
    """End a process that had joined others, with its exit code: Python's own end would wait for them."""
    if current() is not ALONE:
        exit_now(code if isinstance(code, int) else 1)
