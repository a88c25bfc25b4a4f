"""The report's section on the plan: rows with units and charts of targets, search and scaling.

A time is called a lower bound or an estimate; every figure of the search says whether it was compiled whole or
extrapolated from programs of a few blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.core.common.sizes import GIB
from stages.core.records.finetune import FinetuneMetrics
from stages.core.records.plan import Estimate, PlanFile, RunKey, Scaling, Search, StepTime, Target
from stages.core.records.planned import Beside, beside, targets_of
from stages.core.report.axes import Point
from stages.core.report.line_charts import LineChart, series_chart
from stages.core.report.text import NBSP, NONE, binary, duration, percent, signed

# What a device holds, in the order of the bar; the rest of what it needs is code and results.
PARTS = ("weight", "lora", "optimizer", "temporary")
# A target that needs more than its chip has is drawn up to this many percent.
WIDEST = 130.0


@dataclass(frozen=True)
class Training:
    """How much is trained: positions of all epochs (None: not known yet), batches per step, and steps if they are set.

    A target with another batch or length takes as many steps as pass the same positions.
    """

    positions: int | None
    batches_per_step: int
    steps: int | None

    def steps_of(self, target: RunKey) -> int | None:
        """Return how many steps the training takes with a target's batches."""
        if self.steps or not self.positions or not target.positions():
            return self.steps
        return max(1, math.ceil(self.positions / (target.positions() * self.batches_per_step)))


def plan_view(
    plan: PlanFile, run: RunKey, platform: str, measured: FinetuneMetrics | None, training: Training
) -> dict[str, Any]:
    """Return what the template shows of a plan.

    Args:
        plan: the file's content.
        run: how the model was trained.
        platform: of the devices it was trained on; `cpu` for simulated ones.
        measured: what `finetune` measured; None where it did not.
        training: how much is trained.
    """
    return {
        "targets": [_target(label, target) for label, target in plan.targets.items()],
        "times": [_time(label, target, training) for label, target in plan.targets.items() if target.step_time],
        "parts": list(StepTime.model_fields),
        "priced": any(target.price_per_chip_hour for target in plan.targets.values()),
        "measured": [_compared(each) for each in _beside(plan, run, platform, measured)],
        "search": plan.search and _search(plan.search),
        "scaling": plan.scaling and _scaling(plan.scaling),
    }


def _target(label: str, target: Target) -> dict[str, Any]:
    sizes = {part: getattr(target, f"{part}_bytes_per_device") for part in PARTS}
    memory, needed = target.hbm_bytes_per_device, target.needed_bytes_per_device
    return {
        "label": label,
        "fits": target.fits,
        "known": memory is not None,
        "sizes": {part: NONE if size is None else binary(size) for part, size in sizes.items()},
        "needed": NONE if needed is None else binary(needed),
        "memory": NONE if memory is None else binary(memory),
        "share": percent(needed / memory) if needed and memory else NONE,
        "bar": _bar(sizes, needed, memory) if memory else [],
        "sent": _sent(target),
        "bound": _bound(target.step_seconds_lower_bound, target.bound_by),
        "largest": [
            f"{binary(each.bytes)} {each.shape} {each.operator}".strip() for each in target.largest if not target.fits
        ],
    }


def _sent(target: Target) -> str:
    """Return what a device sends in a step, and by which collectives; empty where it sends nothing."""
    if not target.interconnect_bytes_per_step:
        return ""
    kinds = ", ".join(f"{each.count:,} {kind}" for kind, each in target.collectives.items())
    return f"Sends {binary(target.interconnect_bytes_per_step)} per step: {kinds}"


def _bar(sizes: Mapping[str, int | None], needed: int | None, memory: int) -> list[tuple[str, float, float]]:
    """Return (kind, begin, width) in percent of a bar that is `WIDEST` percent of the chip's memory long."""
    pieces, begin = [], 0.0
    known = {kind: size or 0 for kind, size in sizes.items()}
    for kind, size in {**known, "other": (needed or 0) - sum(known.values())}.items():
        width = min(100 * size / memory, WIDEST - begin)
        if width > 0:
            pieces.append((kind, round(100 * begin / WIDEST, 3), round(100 * width / WIDEST, 3)))
            begin += width
    return pieces


def _beside(plan: PlanFile, run: RunKey, platform: str, measured: FinetuneMetrics | None) -> list[Beside]:
    """Return the figures of this run that its plan has too."""
    if measured is None:
        return []
    return [each for target in targets_of(plan, run, platform, measured) for each in beside(target, measured)]


def _time(label: str, target: Target, training: Training) -> dict[str, Any]:
    """Return how long a target's step takes, by what, and what the whole training takes."""
    seconds, steps = target.estimated_step_seconds or 0.0, training.steps_of(target)
    whole = None if steps is None else steps * seconds
    price = target.price_per_chip_hour
    return {
        "label": label,
        "estimate": duration(seconds),
        "share": NONE if target.share_of_peak is None else percent(target.share_of_peak),
        "parts": [duration(value) for _, value in target.step_time or ()],
        "steps": NONE if steps is None else f"{steps:,}",
        "whole": NONE if whole is None else duration(whole),
        "price": NONE if whole is None or not price else f"{whole / 3600 * target.chips * price:,.2f}",
    }


def _compared(each: Beside) -> str:
    """Return a figure planned and measured, in a sentence."""
    told = duration if each.seconds else binary
    off = "to the byte" if each.planned == each.measured else f"{signed(100 * (each.planned / each.measured - 1), 1)} %"
    least = "at least " if each.at_least else ""
    return f"{each.what}: {least}{told(each.planned)} planned, {told(each.measured)} measured ({off})."


def _bound(seconds: float | None, limit: str | None) -> str:
    return NONE if seconds is None else f"{duration(seconds)} ({limit})"


def _estimate(each: Estimate) -> str:
    return NONE if each.estimated_step_seconds is None else duration(each.estimated_step_seconds)


def _tokens(each: Estimate) -> str:
    """Return tokens per second; where there is but a bound of the time, no more than these."""
    if not each.speed:
        return NONE
    return f"{each.speed:,.0f}" if each.tokens_per_second else f"\N{LESS-THAN OR EQUAL TO}{NBSP}{each.speed:,.0f}"


def _search(search: Search) -> dict[str, Any]:
    best = next((each.name for each in search.candidates if each.fits), None)
    return {
        "preset": search.preset,
        "topology": search.topology,
        "rows": [
            {
                "name": each.name,
                "best": each.name == best,
                "batch": f"{each.largest_batch:,}" if each.fits and each.largest_batch else NONE,
                "how": ("compiled" if each.compiled else "extrapolated")
                if each.fits
                else each.reason or "does not fit",
                "needed": NONE if each.needed_bytes is None else binary(each.needed_bytes),
                "bound": _bound(each.step_seconds_lower_bound, each.bound_by),
                "estimate": _estimate(each),
                "tokens": _tokens(each),
            }
            for each in search.candidates
        ],
        "charts": _charts(
            "sequences per batch",
            search.points,
            by=lambda each: each.name,
            x=lambda each: each.batch_size,
            level=("the chip's memory", search.memory_bytes / GIB) if search.memory_bytes else None,
        ),
    }


def _scaling(scaling: Scaling) -> dict[str, Any]:
    charts = _charts(
        "devices", scaling.rows, by=lambda each: each.topology.partition(":")[0], x=lambda each: each.devices
    )
    return {
        "preset": scaling.preset,
        "rows": [
            {
                "topology": each.topology,
                "devices": f"{each.devices:,}",
                "mesh": f"{NBSP}\N{MULTIPLICATION SIGN}{NBSP}".join(f"{size:,}" for size in each.mesh),
                "batch": f"{each.batch_size:,}" if each.batch_size else NONE,
                "fits": each.fits,
                "needed": NONE if each.needed_bytes is None else binary(each.needed_bytes),
                "collectives": [f"{count:,} {kind}" for kind, count in each.collectives.items()],
                "wire": NONE if each.interconnect_bytes is None else binary(each.interconnect_bytes),
                "bound": _bound(each.step_seconds_lower_bound, each.bound_by),
                "estimate": _estimate(each),
                "tokens": _tokens(each),
            }
            for each in scaling.rows
        ],
        "charts": charts,
    }


def _charts(x_name: str, points: Sequence[Estimate], by: Any, x: Any, level: tuple[str, float] | None = None) -> list:
    """Return the charts of memory, bytes sent and step time over a number that doubles, a line per name."""

    def lines(value: Any) -> list[tuple[str, list[Point]]]:
        found: dict[str, dict[float, float]] = {}
        # A point that was compiled comes after the one it confirms, and takes its place.
        for each in points:
            if x(each) and value(each) is not None:
                found.setdefault(by(each), {})[x(each)] = value(each)
        return [(name, sorted(values.items())) for name, values in found.items()]

    estimated = all(each.estimated_step_seconds for each in points if each.step_seconds_lower_bound)
    kind = "estimate" if estimated else "lower bound"

    def milliseconds(each: Estimate) -> float | None:
        seconds = each.estimated_step_seconds if estimated else each.step_seconds_lower_bound
        return seconds and seconds * 1e3

    charts: list[LineChart | None] = [
        series_chart(
            "Memory needed per device",
            "GiB",
            x_name,
            lines(lambda each: each.needed_bytes and each.needed_bytes / GIB),
            level,
        ),
        series_chart(
            "Step time",
            f"ms, {kind}",
            x_name,
            lines(milliseconds),
        ),
        series_chart(
            "Tokens per second",
            "thousands, estimate" if estimated else "thousands, upper bound",
            x_name,
            lines(lambda each: each.speed and each.speed / 1e3),
        ),
        series_chart(
            "Sent to other devices",
            "GiB per device and step",
            x_name,
            lines(lambda each: None if each.interconnect_bytes is None else each.interconnect_bytes / GIB),
        ),
    ]
    return [chart for chart in charts if chart is not None and math.isfinite(chart.y_domain[1])]
