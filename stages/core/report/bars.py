"""Stacked bars of bytes: the geometry of the report's memory chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.core.report.axes import Tick, axis, share, ticks, widened

# A thinner piece of a bar (percent) cannot be seen at all, and LoRA often is; the table next to it has the number.
THINNEST = 0.4


@dataclass(frozen=True)
class Segment:
    """A piece of a stacked bar: where it begins and how long it is (percent); `widened` where it would not be seen."""

    kind: str
    hatched: bool
    x: float
    width: float
    bytes: int
    widened: bool


@dataclass(frozen=True)
class Bar:
    """A stacked bar with its name and its sum in bytes."""

    name: str
    total: int
    segments: list[Segment]


def stacked_bars(bars: Sequence[tuple[str, list[tuple[str, bool, int]]]], unit: int) -> tuple[list[Bar], list[Tick]]:
    """Lay out stacked bars on one axis from zero.

    Args:
        bars: for each bar its name and its pieces (kind, hatched, bytes), in drawing order.
        unit: bytes per unit of the axis.

    Returns:
        The bars, and the ticks of the axis in that unit.
    """
    largest = max((sum(size for *_, size in pieces) for _, pieces in bars), default=0)
    _, high = widened(0.0, max(largest, 1) / unit)
    drawn = []
    for name, pieces in bars:
        x, segments = 0.0, []
        for kind, hatched, size in pieces:
            if size:
                exact = share(size / unit, 0.0, high)
                width = max(exact, THINNEST)
                segments.append(
                    Segment(kind, hatched, round(x, 3), round(min(width, 100 - x), 3), size, exact < THINNEST)
                )
                x += width
        drawn.append(Bar(name, sum(size for *_, size in pieces), segments))
    return drawn, axis([(tick, share(tick, 0.0, high)) for tick in ticks(0.0, high)])
