"""The report's section on the plan: rows with units and charts of targets, search and scaling.

All times are lower bounds and are called so; every figure of the search says whether it was compiled whole or
extrapolated from programs of two and four blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stages.core.common.sizes import GIB
from stages.core.records.finetune import FinetuneMetrics
from stages.core.records.plan import Estimate, PlanFile, RunKey, Scaling, Search, Target
from stages.core.report.axes import Point
from stages.core.report.line_charts import LineChart, series_chart
from stages.core.report.text import NBSP, NONE, binary, duration, percent, signed

# What a device holds, in the order of the bar; the rest of what it needs is code and results.
PARTS = ("weight", "lora", "optimizer", "temporary")
# A target that needs more than its chip has is drawn up to this many percent.
WIDEST = 130.0


def plan_view(plan: PlanFile, run: RunKey, platform: str, measured: FinetuneMetrics | None) -> dict[str, Any]:
    """Return what the template shows of a plan.

    Args:
        plan: the file's content.
        run: how the model was trained.
        platform: of the devices it was trained on; `cpu` for simulated ones.
        measured: what `finetune` measured; None where it did not.
    """
    return {
        "targets": [_target(label, target) for label, target in plan.targets.items()],
        "measured": [
            sentence
            for target in plan.targets.values()
            if measured and target.topology.startswith("cpu:") == (platform == "cpu") and run.matches(target)
            for sentence in _beside_measured(target, measured)
        ],
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
        "collectives": [f"{each.count:,} {kind}" for kind, each in target.collectives.items()],
        "wire": NONE if target.interconnect_bytes_per_step is None else binary(target.interconnect_bytes_per_step),
        "bound": _bound(target.step_seconds_lower_bound, target.bound_by),
        "measured": target.measured_step_seconds and duration(target.measured_step_seconds),
        "largest": [
            f"{binary(each.bytes)} {each.shape} {each.operator}".strip() for each in target.largest if not target.fits
        ],
    }


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


def _beside_measured(target: Target, measured: FinetuneMetrics) -> list[str]:
    """Return the planned figures of this run next to the measured ones."""
    found = []
    if target.argument_bytes_per_device:
        planned = target.argument_bytes_per_device - target.batch_bytes_per_device
        found.append(f"State per device: {_compared(planned, measured.state_bytes_per_device)}.")
    if target.topology.startswith("cpu:") and target.temporary_bytes_per_device:
        if grown := measured.step_growth_bytes:
            planned = target.devices * target.temporary_bytes_per_device
            found.append(f"Temporaries of all {target.devices} simulated devices: {_compared(planned, grown)}.")
    elif target.needed_bytes_per_device and (peak := measured.peak_device_bytes):
        found.append(
            f"Memory needed per device ({target.topology}): {_compared(target.needed_bytes_per_device, peak)}."
        )
    return found


def _compared(planned: int, measured: int) -> str:
    off = "to the byte" if planned == measured else f"{signed(100 * (planned / measured - 1), 1)} %"
    return f"{binary(planned)} planned, {binary(measured)} measured ({off})"


def _bound(seconds: float | None, limit: str | None) -> str:
    return NONE if seconds is None else f"{duration(seconds)} ({limit})"


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
                "tokens": f"{each.tokens_per_second_upper_bound:,.0f}" if each.tokens_per_second_upper_bound else NONE,
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
                "tokens": f"{each.tokens_per_second_upper_bound:,.0f}" if each.tokens_per_second_upper_bound else NONE,
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
            "ms, lower bound",
            x_name,
            lines(lambda each: each.step_seconds_lower_bound and each.step_seconds_lower_bound * 1e3),
        ),
        series_chart(
            "Tokens per second",
            "thousands, upper bound",
            x_name,
            lines(lambda each: each.tokens_per_second_upper_bound and each.tokens_per_second_upper_bound / 1e3),
        ),
        series_chart(
            "Sent to other devices",
            "GiB per device and step",
            x_name,
            lines(lambda each: None if each.interconnect_bytes is None else each.interconnect_bytes / GIB),
        ),
    ]
    return [chart for chart in charts if chart is not None and math.isfinite(chart.y_domain[1])]
