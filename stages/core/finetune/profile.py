"""A JAX profile of a few steps of a training run, for TensorBoard or Perfetto."""

from __future__ import annotations

import logging
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

# Steps in a profile, after the one that compiles.
STEPS = 3


class StepProfile:
    """The profile of a process; one that cannot be written never ends the run.

    `last` is the step, counted from 1, that it ends with; None where there is none.
    """

    def __init__(self, folder: Path | None) -> None:
        """Take the folder that it is written below; None: there is no profile."""
        self.last: int | None = None
        self._folder = folder
        self._first: int | None = None
        self._runs = False

    def plan(self, step: int, steps: int) -> None:
        """Choose the steps: from the process's second on, or its only one.

        Args:
            step: the process's first, counted from 0.
            steps: of the run.
        """
        if self._folder:
            self._first = min(step + 1, steps - 1)
            self.last = min(self._first + STEPS, steps)

    def begin(self, step: int) -> None:
        """Begin, if this step (counted from 0) is the first."""
        if self._folder is None or step != self._first:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.warning(f"the JAX profile is not written ({error}).")
        else:
            jax.profiler.start_trace(str(self._folder))
            self._runs = True

    def end(self, step: int) -> None:
        """End, if this step (counted from 1) is the last."""
        if not self._runs or step != self.last:
            return
        self._runs = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            # The writer raises one type for all causes.
            logger.warning(f"the JAX profile is not written ({str(error).splitlines()[0][:200]}).")
        else:
            logger.info(f"Wrote a JAX profile below {self._folder}.")
