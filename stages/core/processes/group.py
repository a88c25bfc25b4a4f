"""The processes of this run as the rest of the code sees them: one alone, unless some have joined.

Purpose: what asks "is this the first process?" or reports how far it is needs neither JAX nor a network.
"""

from __future__ import annotations

from typing import Any

from stages.core.processes.reports import Reports

# Seconds without progress after which a process is taken for stuck, for what it says it is doing. What may compile has
# the longest: XLA takes minutes for the largest models.
STEP_LIMIT = 45.0
COMPILE_LIMIT = 3600.0
VALIDATION_LIMIT = 1800.0
SAMPLE_LIMIT = 900.0
SAVE_LIMIT = 900.0
LOAD_LIMIT = 3600.0


class Group:
    """A process alone, and what several have in common with it.

    Attributes:
        index: this process, from 0; it writes the outputs if it is 0.
        count: processes of the run.
        inbox: what was reported to this process.
    """

    index = 0
    count = 1

    def __init__(self) -> None:
        """Begin without reports."""
        self.inbox = Reports()

    @property
    def first(self) -> bool:
        """Whether this process writes the outputs."""
        return self.index == 0

    @property
    def prefix(self) -> str:
        """What begins this process's messages: nothing for the first."""
        return "" if self.first else f"[process {self.index} of {self.count}] "

    def doing(self, what: str, limit: float) -> None:
        """Say what begins now, for the watchdog of several processes.

        Args:
            what: such as `step 12`, for its message.
            limit: seconds after which this process is taken for stuck in it.
        """

    def stop_after(self, step: int, asked: str | None) -> str | None:
        """Return why the run stops after a step, or None: the same on all processes for the same step.

        To be called for each step, in order, before the next is dispatched; several times for one is allowed.

        Args:
            step: the step done or dispatched, from 1.
            asked: why this process is to stop, such as the name of a signal; None: it is not.
        """
        return asked

    def share(self, value: Any = None) -> Any:
        """Return the first process's value on all; what JSON can hold. The others' own is ignored."""
        return value

    def report(self, topic: str, content: Any) -> None:
        """Tell the first process something; what JSON can hold. Any thread may.

        Args:
            topic: what it is about: each process reports once on it.
            content: of the report.
        """
        self.inbox.put(self.index, topic, content)

    def reports(self, topic: str, count: int) -> list[Any]:
        """Wait until the first `count` processes have reported on a topic, and return what; on the first process."""
        return self.inbox.take(topic, count)


ALONE = Group()
_current: Group = ALONE


def current() -> Group:
    """Return the group this process is in."""
    return _current


def set_current(group: Group) -> None:
    """Make a group the current one."""
    global _current
    _current = group
