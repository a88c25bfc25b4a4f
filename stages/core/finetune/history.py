"""What a training run has done so far: its curve, its samples, and where its time went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from stages.core.records.finetune import Sample, Step

PHASES = ("load", "validation", "sample", "checkpoint")


@dataclass
class History:
    """What a run has done so far, over all its processes; saved in each checkpoint.

    `rows` is the curve; `step_seconds` has one entry per step and `first_steps` lists those that began a process and
    include a compilation. `seconds` are of all other work, by kind. `waited` counts validations since the lowest loss.
    `step_growth` is the growth in bytes of the process's memory within a step on CPU devices, if it can be measured.
    `busiest_expert` has an entry per step of a model with experts: see `causal_lm.BUSIEST`.
    """

    rows: list[Step] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    first_steps: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    samples: list[Sample] = field(default_factory=list)
    best_loss: float | None = None
    waited: int = 0
    stopped_early: bool = False
    step_growth: int | None = None
    busiest_expert: list[float] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> History:
        """Return the history that `state` was made of."""
        return TypeAdapter(cls).validate_python(state)

    def state(self) -> dict[str, Any]:
        """Return the history as JSON can hold it."""
        return TypeAdapter(type(self)).dump_python(self)

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.rows)

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Add the time the block takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - began
