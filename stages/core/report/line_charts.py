"""Lines over training steps, or over a number that doubles: the geometry of the report's charts.

They are SVG in the page, not Vega-Lite: its bundle made a page of 0.1 MB one of 1.0 MB, drew nothing without scripts or
before they ran, and took another drawing for the dark scheme.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stages.core.report.axes import Point, Tick, axis, share, ticks, widened

# Maximum points of a line: more than one per pixel cannot be seen, and the page stays small.
MOST_POINTS = 800
# More dots than this would be a thick line; the curve that joins them is enough.
MOST_DOTS = 60
# Lines with distinct colours and dashes; more lines reuse them.
SERIES = 8


@dataclass(frozen=True)
class Line:
    """A curve: `style` is a CSS class (raw, alone, mean, before, held), `pieces` are SVG point lists."""

    name: str
    style: str
    pieces: list[str]


@dataclass(frozen=True)
class Dot:
    """A single value at (`x`, `y`) percent of the drawing area; `style` is the CSS class of its line."""

    x: float
    y: float
    label: str
    style: str = "held"


@dataclass(frozen=True)
class LineChart:
    """A chart over training steps, or over a number that doubles.

    `x_domain` and `y_domain` let the page turn positions back into values; with `doubling` the first holds logarithms
    to the base 2. `legend`: its lines differ by more than their kind.
    """

    title: str
    unit: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    dots: list[Dot]
    breaks: list[float]
    x_domain: Point
    y_domain: Point
    span: int
    summary: str
    x_name: str = "step"
    doubling: bool = False
    legend: bool = False


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Return the exponential moving mean over about `span` values, corrected for its start.

    The weight of the newest value is 2 / (span + 1); dividing by the sum of the weights so far (the bias correction of
    Adam, arXiv:1412.6980, section 3) keeps the first values from leaning to zero. Values that are not finite are
    passed over: the mean stays where it was.
    """
    keep = 1.0 - 2.0 / (span + 1)
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = keep * mean + (1.0 - keep) * value
            weight = keep * weight + (1.0 - keep)
        result.append(mean / weight if weight else math.nan)
    return result


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most `most` points with the same outline: the lowest and the highest of each of `most` / 2 groups."""
    if len(points) <= most:
        return list(points)
    groups = most // 2
    kept: list[Point] = []
    for number in range(groups):
        group = points[number * len(points) // groups : (number + 1) * len(points) // groups]
        ends = {group.index(min(group, key=lambda p: p[1])), group.index(max(group, key=lambda p: p[1]))}
        kept += [group[index] for index in sorted(ends)]
    return kept


def _pieces(points: Sequence[Point], x_domain: Point, y_domain: Point) -> list[str]:
    """Return the SVG point lists of a line, which is broken where a value is not finite."""
    found = []
    for is_finite, group in itertools.groupby(points, key=lambda point: math.isfinite(point[1])):
        if is_finite:
            piece = list(group)
            # Each piece gets its part of the points, so that the line looks equally fine on both sides of a break.
            kept = thinned(piece, max(2, MOST_POINTS * len(piece) // len(points)))
            found.append(
                " ".join(f"{share(x, *x_domain) * 10:.1f},{1000 - share(y, *y_domain) * 10:.1f}" for x, y in kept)
            )
    return found


def line_chart(
    title: str,
    unit: str,
    steps: Sequence[float],
    values: Sequence[float],
    validation: Sequence[Point] = (),
    breaks: Iterable[float] = (),
    from_zero: bool = False,
    noisy: bool = True,
) -> LineChart | None:
    """Lay out a chart of one quantity over training steps, with its moving mean and measurements on validation data.

    Args:
        title: what is measured.
        unit: its unit, shown next to the title.
        steps: the x values, ascending; as many as `values`.
        values: one value per step; where one is not finite the line is broken.
        validation: (step, value) pairs drawn as dots joined by a line.
        breaks: steps at which a new epoch begins.
        from_zero: whether the y axis begins at zero.
        noisy: whether a moving mean helps; not with a quantity that is set, not measured.

    Returns:
        The chart, or None where there is no finite value.
    """
    finite = [value for value in values if math.isfinite(value)]
    validation = [point for point in validation if math.isfinite(point[1])]
    if not finite:
        return None
    # A tenth of a short run, fewer of a long one: enough to see the trend, few enough not to flatten it.
    span = max(2, min(len(values) // 10, max(50, len(values) // 50)))
    mean = smoothed(values, span)
    everything = [*finite, *(value for _, value in validation)]
    y_domain = widened(min(0.0, *everything) if from_zero else min(everything), max(everything))
    x_low, x_high = min(steps), max(steps)
    x_domain = (x_low, x_high) if x_low < x_high else (x_low - 0.5, x_high + 0.5)

    has_mean = noisy and len(finite) > 2 * span
    lines = [
        Line(
            "each step",
            "raw" if has_mean else "alone",
            _pieces(list(zip(steps, values, strict=True)), x_domain, y_domain),
        )
    ]
    if has_mean:
        lines.append(Line("moving mean", "mean", _pieces(list(zip(steps, mean, strict=True)), x_domain, y_domain)))
    if validation:
        lines.append(Line("validation sequences, during training", "held", _pieces(validation, x_domain, y_domain)))
    return LineChart(
        title=title,
        unit=unit,
        x_ticks=axis([(tick, share(tick, *x_domain)) for tick in ticks(*x_domain, least=1.0)]),
        y_ticks=axis([(tick, round(100 - share(tick, *y_domain), 3)) for tick in ticks(*y_domain)]),
        lines=lines,
        dots=[
            Dot(share(x, *x_domain), round(100 - share(y, *y_domain), 3), f"step {x:,.0f}: {y:.4g}")
            for x, y in (validation if len(validation) <= MOST_DOTS else [])
        ],
        breaks=[share(step, *x_domain) for step in breaks],
        x_domain=x_domain,
        y_domain=y_domain,
        span=span,
        summary=f"{title} over {len(values):,} steps: {finite[0]:.4g} at the first, {finite[-1]:.4g} at the last, "
        f"between {min(finite):.4g} and {max(finite):.4g}.",
    )


def series_chart(
    title: str,
    unit: str,
    x_name: str,
    series: Sequence[tuple[str, Sequence[Point]]],
    level: tuple[str, float] | None = None,
    doubling: bool = True,
) -> LineChart | None:
    """Lay out several lines over a number that doubles from point to point, from zero upwards, or over steps.

    Args:
        title: what is shown.
        unit: its unit, shown next to the title.
        x_name: what the number counts.
        series: a name and (number, value) pairs for each line, the numbers positive and ascending.
        level: name and value of a level line, such as a limit.
        doubling: False: the number is of steps, and the y axis begins at the lowest value.

    Returns:
        The chart, or None where there is no value.
    """
    series = [(name, [point for point in values if math.isfinite(point[1])]) for name, values in series]
    points = [point for _, values in series for point in values]
    if not points:
        return None
    scale: Callable[[float], float] = math.log2 if doubling else float
    numbers = sorted({number for number, _ in points})
    low, high = scale(numbers[0]), scale(numbers[-1])
    x_domain = (low, high) if low < high else (low - 0.5, high + 0.5)
    values = [value for _, value in points] + ([level[1]] if level else [])
    y_domain = widened(0.0 if doubling else min(values), max(values))
    lines, dots = [], []
    for index, (name, line) in enumerate(series):
        style = f"series-{index % SERIES}"
        placed = [(scale(number), value) for number, value in line]
        lines.append(Line(name, style, _pieces(placed, x_domain, y_domain)))
        dots += [
            Dot(
                share(x, *x_domain),
                round(100 - share(value, *y_domain), 3),
                f"{name}, {number:,.0f} {x_name}: {value:.4g}",
                style,
            )
            for (x, value), (number, _) in zip(placed, line if len(line) <= MOST_DOTS else [], strict=False)
        ]
    if level:
        y = 1000 - share(level[1], *y_domain) * 10
        lines.append(Line(level[0], "before", [f"0.0,{y:.1f} 1000.0,{y:.1f}"]))
    marks = numbers if doubling else ticks(*x_domain, least=1.0)
    largest = max(points, key=lambda point: point[1])
    return LineChart(
        title=title,
        unit=unit,
        x_ticks=[Tick(share(scale(number), *x_domain), f"{number:,.0f}") for number in marks],
        y_ticks=axis([(tick, round(100 - share(tick, *y_domain), 3)) for tick in ticks(*y_domain)]),
        lines=lines,
        dots=dots,
        breaks=[],
        x_domain=x_domain,
        y_domain=y_domain,
        span=0,
        summary=f"{title} for {', '.join(name for name, _ in series)} over {numbers[0]:,.0f} to {numbers[-1]:,.0f} "
        f"{x_name}; at most {largest[1]:.4g} {unit}.",
        x_name=x_name,
        doubling=doubling,
        legend=True,
    )
