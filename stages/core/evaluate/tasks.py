"""The tasks of the harness among `evaluate.tasks`: whether they can run, before anything is loaded.

Purpose: EleutherAI's lm-evaluation-harness is no requirement of the pipeline.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from stages.core.common.errors import StageError, shown_list

PREFIX = "lm_eval:"
PACKAGE = "lm_eval"
# From model, tokenizer, `measured`, longest sequence and limit to each task's scores: see `harness.Harness`.
Harness = Callable[..., dict[str, dict[str, float]]]


def open_harness(tasks: Sequence[str]) -> Harness | None:
    """Load the tasks of the harness with their data; None where there are none.

    Args:
        tasks: `evaluate.tasks`.

    Raises:
        StageError: the package is not installed, a task does not exist, or its data cannot be had.
    """
    names = [task.removeprefix(PREFIX) for task in tasks if task.startswith(PREFIX)]
    if not names:
        return None
    if importlib.util.find_spec(PACKAGE) is None:
        raise StageError(
            f"For tasks of the lm-evaluation-harness the package {PACKAGE} must be installed. Received: evaluate.tasks="
            f"{shown_list(tasks)}\nRun `pip install -r requirements-tasks.txt`, or take these out of evaluate.tasks."
        )
    # It reads the environment when it is imported, as the libraries that it uses do.
    from stages.core.evaluate.harness import load_tasks

    return load_tasks(names)
