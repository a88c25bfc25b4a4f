"""The command line that all stages share: options, reading the settings, messages, errors, and the metrics file.

Purpose: a stage script is a straight line from `Run` to its outputs. Nothing heavy is imported here, so that `--help`
and errors in params appear immediately. The scripts take click from here too: the check in `stages/__init__.py` must
come before it, and a script run as a file (`python stages/prepare.py`) would import click first.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from stages.core.common.errors import ParamsError, StageError, shown
from stages.core.common.installed import check_installed
from stages.core.common.paths import Paths, check_outputs, inputs_of, lend_a_home, metrics
from stages.core.common.redaction import guard_standard_error
from stages.core.config.reader import read_params
from stages.core.config.schema import Params
from stages.core.files import explain
from stages.core.processes import facts, together
from stages.core.processes.group import current
from stages.core.records.record import FileRecord

REQUIREMENTS = "requirements.txt"
# The stages with a model on the mesh, which may be run by several processes.
OF_PROCESSES = ("load", "finetune", "generate", "evaluate")
# The scripts' own, and above those of all modules. A script that is run is called `__main__`, and one that is run as a
# file cannot import logging first: that needs the standard library's tokenize, and finds the stage's.
logger = logging.getLogger("stages")


@dataclass(frozen=True)
class Run:
    """What a stage works with: the validated settings and the paths."""

    params: Params
    paths: Paths
    verbose: bool

    @property
    def first(self) -> bool:
        """Whether this process writes the outputs: of several the first does, and one alone."""
        return current().first

    def write_metrics(self, name: str, values: FileRecord) -> None:
        """Write `data/metrics/<name>.json`."""
        values.write(self.paths.write(metrics(name)))


def stage(function: Callable[..., None]) -> click.Command:
    """Turn `main(run, ...)` into a click command with the options every stage has.

    Exit codes: 0 done, 1 the task failed, 2 a wrong setting or call, 130 interrupted.
    """
    # Not `__module__`, which is `__main__` in a script that is run.
    name = Path(function.__code__.co_filename).stem

    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Override one setting for this run; may be repeated.",
    )
    @click.option(
        "--out-root",
        type=click.Path(file_okay=False, path_type=Path),
        help="Write outputs below this folder, and read from it what is there: a trial that leaves DVC's state alone.",
    )
    @click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def command(overrides: tuple[str, ...], out_root: Path | None, verbose: bool, **options: Any) -> None:
        # Each look for cycles goes through all objects of JAX and Keras, half a second of a start: look seldom.
        gc.set_threshold(100_000, 20, 100)
        with ended_with_others(), mistakes_in_lines(verbose):
            root = Path.cwd()
            params = read_params(root / "params.yaml", overrides)
            if options.get("variant"):
                _check_variant(params, options["variant"])
            writes = not any(options.get(name) for name in ("check", "dry_run", "verify", "prompt", "chat"))
            of_several = name in OF_PROCESSES and not (options.get("dry_run") or options.get("chat"))
            if of_several:
                together.launch(params.mesh.launcher, name, sys.argv[1:])
            if writes and overrides and out_root is None and not os.environ.get("DVC_STAGE"):
                click.echo(
                    "Note: --set without --out-root writes into the pipeline's own outputs; dvc repro will redo them.",
                    err=True,
                )
            if writes and (root / REQUIREMENTS).is_file():
                check_installed(root / REQUIREMENTS)
            run = Run(params, Paths(root, (out_root or root).resolve()), verbose)
            variant = options.get("variant")

            def compared() -> dict[str, str]:
                files = inputs_of(run.paths, name, variant, params.variants, params.finetune.start_from)
                return facts.facts_of(name, params.model_dump(mode="json"), options, files)

            with together.joined(params.mesh.join_timeout, compared) if of_several else contextlib.nullcontext():
                if writes and run.first:
                    check_outputs(run.paths.out_root, name)
                function(run, **options)

    return click.command(help=function.__doc__)(command)


def _check_variant(params: Params, name: str) -> None:
    """Refuse a --variant that is not there.

    Raises:
        ParamsError: names those that are.
    """
    if name not in params.every_variant:
        raise ParamsError(
            f"--variant must be one of {', '.join(params.every_variant)}. Received: --variant={shown(name)}\n"
            "Name an adapter's folder in the section variants of params.yaml to have it as a variant."
        )


@contextlib.contextmanager
def ended_with_others() -> Iterator[None]:
    """Within the block a process that has joined others and fails ends at once: Python's end would wait for them."""
    try:
        yield
    except SystemExit as end:
        together.leave(end.code)
        raise
    except BaseException as error:
        if current().count > 1:
            traceback.print_exception(error)
        together.leave(1)
        raise


@contextlib.contextmanager
def mistakes_in_lines(verbose: bool) -> Iterator[None]:
    """Within the block a user error ends the process with one or two lines and its exit code."""
    guard_standard_error()
    try:
        # From here on Ctrl-C is an exception; `stages/__init__.py` had it end the process while modules load.
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        lend_a_home()
        with records_on_standard_error():
            yield
    except StageError as error:
        fail(error, verbose)
    except ModuleNotFoundError as error:
        missing = StageError(
            f"This Python was built without its own module {error.name}. Received: python={sys.executable}. Use "
            "another one: `make venv PYTHON=...`."
            if error.name in sys.stdlib_module_names
            else f"The package {error.name} is not installed for {sys.executable}. Run `make venv`, then "
            "`. .venv/bin/activate`."
        )
        fail(missing.with_traceback(error.__traceback__), verbose)
    except OSError as error:
        # A closed pipe is click's; what is not of the system (an error of a network library) has no number.
        if error.errno in (None, errno.EPIPE):
            raise
        fail(StageError(explain(error)).with_traceback(error.__traceback__), verbose)
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(130)


@contextlib.contextmanager
def records_on_standard_error() -> Iterator[None]:
    """Within the block show what the stages log, from INFO on; what other libraries log is left to their own handlers.

    Standard output is for tables one may pipe.
    """
    handler = _StandardError()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    # A library may have given the root logger a handler, which would show each record once more.
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)
        logger.propagate = True


class _StandardError(logging.Handler):
    """Prints to what `sys.stderr` is at the time; a closed pipe is an error as for any other output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        click.echo(current().prefix + line_of(record), err=True)


def line_of(record: logging.LogRecord) -> str:
    """Return what is shown of a record: its bare message, after `Warning: ` if it is one."""
    return ("Warning: " if record.levelno >= logging.WARNING else "") + record.getMessage()


def fail(error: StageError, verbose: bool) -> None:
    """Show a user error and exit with its code."""
    if verbose:
        traceback.print_exception(error)
    prefix = "Invalid setting" if isinstance(error, ParamsError) else "Error"
    click.echo(f"{current().prefix}{prefix}: {error}", err=True)
    sys.exit(error.exit_code)
