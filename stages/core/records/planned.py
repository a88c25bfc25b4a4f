"""A run compared with its plan: the figures that both have, for the messages of `finetune` and for the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stages.core.records.finetune import FinetuneMetrics
from stages.core.records.plan import PlanFile, RunKey, Target


@dataclass(frozen=True)
class Beside:
    """One figure planned and measured, in bytes or seconds.

    `at_least`: the plan has only a lower bound.
    """

    what: str
    planned: float
    measured: float
    seconds: bool = False
    at_least: bool = False


def targets_of(plan: PlanFile, run: RunKey, platform: str, measured: FinetuneMetrics) -> Iterator[Target]:
    """Yield the targets that are this very run, on devices of the kind that it ran on.

    Args:
        plan: of any steps.
        run: how the model was trained.
        platform: of the devices it was trained on; `cpu` for simulated ones.
        measured: the run's metrics.
    """
    for target in plan.targets.values():
        kinds = {target.device_kind, measured.device_kind}
        # Files written before the kind was recorded have the platform alone.
        here = len(kinds) == 1 or not all(kinds)
        if here and target.topology.startswith("cpu:") == (platform == "cpu") and run.matches(target):
            yield target


def beside(target: Target, measured: FinetuneMetrics) -> list[Beside]:
    """Return what a target plans next to what its run measured.

    Simulated devices share the host's processor: their temporaries are reported together, and their time is at least
    what all their matrix products take at the rate of the one that the run measured.
    """
    found = []
    if target.argument_bytes_per_device:
        held = target.argument_bytes_per_device - target.batch_bytes_per_device
        found.append(Beside("State per device", held, measured.state_bytes_per_device))
    if target.topology.startswith("cpu:"):
        if target.temporary_bytes_per_device and measured.step_growth_bytes:
            what = f"Temporaries of all {target.devices} simulated devices"
            found.append(Beside(what, target.devices * target.temporary_bytes_per_device, measured.step_growth_bytes))
        if target.flops_per_step and measured.flops_per_second_of_matrix_product:
            fastest = target.devices * target.flops_per_step / measured.flops_per_second_of_matrix_product
            found.append(Beside("Time per step", fastest, measured.step_seconds_median, seconds=True, at_least=True))
        return found
    if target.needed_bytes_per_device and measured.peak_device_bytes:
        what = f"Memory needed per device ({target.topology})"
        found.append(Beside(what, target.needed_bytes_per_device, measured.peak_device_bytes))
    expected = target.estimated_step_seconds or target.step_seconds_lower_bound
    if expected:
        bound = target.estimated_step_seconds is None
        what = f"Time per step ({target.topology})"
        found.append(Beside(what, expected, measured.step_seconds_median, seconds=True, at_least=bound))
    return found
