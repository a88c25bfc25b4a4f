"""Axes of the report's pictures: ticks, their labels, and positions along an axis, as plain numbers.

Purpose: the template draws what `line_charts`, `bars` and `mesh_picture` compute, so that all markup (and all escaping)
is in one place. Positions along an axis are percentages of the drawing area and lines are in a square of 1000 units, so
that a picture stretches with the page while its text keeps its size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: `at` in percent of its length (from the left, or from the top), and its text."""

    at: float
    label: str


def nice_step(length: float, count: int) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that divides `length` into about `count` parts.

    Source: Heckbert, "Nice numbers for graph labels", Graphics Gems (1990).
    """
    rough = length / count
    power = 10.0 ** math.floor(math.log10(rough))
    fraction = rough / power
    nice = 1 if fraction <= 1 else 2 if fraction <= 2 else 5 if fraction <= 5 else 10
    return nice * power


def ticks(low: float, high: float, count: int = 5, least: float = 0.0) -> list[float]:
    """Return the multiples of a nice step, at least `least`, from `low` to `high`, both included where multiples."""
    if not low < high:
        return [low]
    step = max(nice_step(high - low, count), least)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    # 12 digits drop the rounding error of multiplying by 0.1 (0.30000000000000004).
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def widened(low: float, high: float, count: int = 5) -> Point:
    """Return the interval stretched to whole nice steps, so that the first and the last tick are at its ends."""
    # Ticks are rounded to 12 digits, which must stay far below the tolerance (in steps) of what follows.
    if high - low <= 1e-5 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    while True:
        step = nice_step(high - low, count)
        start = float(f"{math.floor(low / step + 1e-6) * step:.12g}")
        end = float(f"{math.ceil(high / step - 1e-6) * step:.12g}")
        # A longer interval may want a longer step, which its ends must be multiples of in turn.
        if (start, end) == (low, high):
            return start, end
        low, high = start, end


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return the texts of an axis' ticks: equal decimals, thousands separators, a true minus.

    Steps below 0.0001 are written as 5e-5: a row of zeros is hard to read.
    """
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    if step < 1e-4:
        texts = [re.sub(r"e-0?", "e-", f"{value:.3g}") for value in values]
    else:
        decimals = next((digits for digits in range(6) if math.isclose(step, round(step, digits), rel_tol=1e-6)), 6)
        texts = [f"{value:,.{decimals}f}" for value in values]
    return [re.sub(r"(?<!e)-|-(?=\d+$)", "\N{MINUS SIGN}", text) for text in texts]


def share(value: float, low: float, high: float) -> float:
    """Return the position of `value` between `low` and `high`, in percent with three decimals."""
    return round(100.0 * (value - low) / (high - low), 3)


def axis(marks: Sequence[tuple[float, float]]) -> list[Tick]:
    """Return ticks from (value, percent along the axis) pairs."""
    labels = tick_labels([value for value, _ in marks])
    return [Tick(at, label) for (_, at), label in zip(marks, labels, strict=True)]
