"""The report's section on the plan: what the compiler said of each target, of the search and of the scaling.

Purpose: turn `data/sharding/plan.json` into rows with units and into charts. All times are lower bounds and are called
so; every figure of the search says whether it was compiled whole or extrapolated from programs of two and four blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from stages.core.report_charts import LineChart, Point, series_chart
from stages.core.report_text import NBSP, NONE, binary, duration, percent, signed

GIB = 2**30
# What a device holds, in the order of the bar; the rest of what it needs is code and results.
PARTS = ("weight", "lora", "optimizer", "temporary")
# A target that needs more than its chip has is drawn up to this many percent.
WIDEST = 130.0


class Kind(BaseModel):
    """Collectives of one kind."""

    count: int
    bytes: int


class Buffer(BaseModel):
    """One of the largest buffers of a program that does not fit."""

    bytes: int
    shape: str
    operator: str


class Target(BaseModel):
    """A step on a topology; sizes in bytes for one device."""

    preset: str
    topology: str
    devices: int
    mesh: list[int]
    layout: str
    dtype: str
    batch_size: int
    length: int
    rank: int
    rematerialize: bool
    step: str
    fits: bool
    weight_bytes_per_device: int = 0
    lora_bytes_per_device: int = 0
    optimizer_bytes_per_device: int = 0
    batch_bytes_per_device: int = 0
    argument_bytes_per_device: int | None = None
    temporary_bytes_per_device: int | None = None
    needed_bytes_per_device: int | None = None
    hbm_bytes_per_device: int | None = None
    collectives: dict[str, Kind] = {}
    wire_bytes_per_step: int | None = None
    least_step_seconds: float | None = None
    least_step_limit: str | None = None
    measured_step_seconds: float | None = None
    largest: list[Buffer] = []


class Found(BaseModel):
    """What the search or the scaling found for one mesh and batch."""

    mesh: list[int]
    layout: str
    fits: bool
    name: str = ""
    batch_size: int | None = None
    largest_batch: int | None = None
    compiled: bool = False
    reason: str | None = None
    needed_bytes: int | None = None
    least_seconds: float | None = None
    least_limit: str | None = None
    tokens_per_second_bound: float | None = None
    wire_bytes: int | None = None
    collectives: dict[str, int] = {}
    topology: str = ""
    devices: int = 0


class Search(BaseModel):
    """All candidates, best first, and every point that was looked at."""

    preset: str
    topology: str
    memory_bytes: int | None = None
    candidates: list[Found]
    points: list[Found]


class Scaling(BaseModel):
    """One step on more and more chips."""

    preset: str
    rows: list[Found]


class PlanFile(BaseModel):
    """`data/sharding/plan.json`."""

    targets: dict[str, Target]
    search: Search | None
    scaling: Scaling | None


def plan_view(plan: PlanFile, run: Mapping[str, Any], platform: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template shows of a plan.

    Args:
        plan: the file's content.
        run: how the model was trained, by the keys of a target: `preset`, `mesh`, `layout`, ...
        platform: of the devices it was trained on; `cpu` for simulated ones.
        measured: the metrics of `finetune`; empty where there are none.
    """
    return {
        "targets": [_target(label, target) for label, target in plan.targets.items()],
        "measured": [
            sentence
            for target in plan.targets.values()
            if target.topology.startswith("cpu:") == (platform == "cpu")
            and all(getattr(target, key) == value for key, value in run.items())
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
        "wire": NONE if target.wire_bytes_per_step is None else binary(target.wire_bytes_per_step),
        "least": _least(target.least_step_seconds, target.least_step_limit),
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


def _beside_measured(target: Target, measured: Mapping[str, Any]) -> list[str]:
    """Return what the compiler said of this very run beside what the run measured of itself."""
    found = []
    if target.argument_bytes_per_device and (held := measured.get("state_bytes_per_device")):
        planned = target.argument_bytes_per_device - target.batch_bytes_per_device
        found.append(f"State a device: {_compared(planned, held)}.")
    if target.topology.startswith("cpu:") and target.temporary_bytes_per_device:
        if grown := measured.get("step_growth_bytes"):
            planned = target.devices * target.temporary_bytes_per_device
            found.append(f"Temporaries of all {target.devices} simulated devices: {_compared(planned, grown)}.")
    elif target.needed_bytes_per_device and (peak := measured.get("peak_device_bytes")):
        found.append(f"Memory a device needs ({target.topology}): {_compared(target.needed_bytes_per_device, peak)}.")
    return found


def _compared(planned: int, measured: int) -> str:
    off = "to the byte" if planned == measured else f"{signed(100 * (planned / measured - 1), 1)} %"
    return f"{binary(planned)} planned, {binary(measured)} measured ({off})"


def _least(seconds: float | None, limit: str | None) -> str:
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
                "least": _least(each.least_seconds, each.least_limit),
                "tokens": f"{each.tokens_per_second_bound:,.0f}" if each.tokens_per_second_bound else NONE,
            }
            for each in search.candidates
        ],
        "charts": _charts(
            "windows a batch",
            search.points,
            by=lambda each: each.name,
            x=lambda each: each.batch_size,
            level=("the chip's memory", search.memory_bytes / GIB) if search.memory_bytes else None,
        ),
    }


def _how(found: Found) -> str:
    if not found.fits:
        return found.reason or "does not fit"
    return "compiled" if found.compiled else "extrapolated"


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
                "wire": NONE if each.wire_bytes is None else binary(each.wire_bytes),
                "least": _least(each.least_seconds, each.least_limit),
                "tokens": f"{each.tokens_per_second_bound:,.0f}" if each.tokens_per_second_bound else NONE,
            }
            for each in scaling.rows
        ],
        "charts": charts,
    }


def _charts(x_name: str, points: Sequence[Found], by: Any, x: Any, level: tuple[str, float] | None = None) -> list:
    """Return the charts of memory, sent bytes and least time over a number that doubles, a line for each name."""

    def lines(value: Any) -> list[tuple[str, list[Point]]]:
        found: dict[str, dict[float, float]] = {}
        # A point that was compiled comes after the one it confirms, and takes its place.
        for each in points:
            if x(each) and value(each) is not None:
                found.setdefault(by(each), {})[x(each)] = value(each)
        return [(name, sorted(values.items())) for name, values in found.items()]

    charts: list[LineChart | None] = [
        series_chart(
            "Memory a device needs",
            "GiB",
            x_name,
            lines(lambda each: each.needed_bytes and each.needed_bytes / GIB),
            level,
        ),
        series_chart(
            "Least time of a step",
            "ms, lower bound",
            x_name,
            lines(lambda each: each.least_seconds and each.least_seconds * 1e3),
        ),
        series_chart(
            "Tokens a second at most",
            "thousands, upper bound",
            x_name,
            lines(lambda each: each.tokens_per_second_bound and each.tokens_per_second_bound / 1e3),
        ),
        series_chart(
            "Sent to other devices",
            "GiB a device and step",
            x_name,
            lines(lambda each: None if each.wire_bytes is None else each.wire_bytes / GIB),
        ),
    ]
    return [chart for chart in charts if chart is not None and math.isfinite(chart.y_domain[1])]
