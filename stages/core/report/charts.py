"""The geometry of the report's pictures: ticks, lines, bars and the mesh, as plain numbers.

Purpose: the template draws what this computes, so that all markup (and all escaping) is in one place. Positions along
an axis are percentages of the drawing area and lines are in a square of 1000 units, so that a picture stretches with
the page while its text keeps its size.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Maximum points of a line: more than one per pixel cannot be seen, and the page stays small.
MOST_POINTS = 800
# More dots than this would be a thick line; the curve that joins them is enough.
MOST_DOTS = 60
# A mesh axis longer than this is drawn as its beginning and its end.
MOST_DRAWN = 16
# A thinner piece of a bar (percent) cannot be seen at all, and LoRA often is; the table next to it has the number.
THINNEST = 0.4
# Lines with distinct colours and dashes; more lines reuse them.
SERIES = 8

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: `at` in percent of its length (from the left, or from the top), and its text."""

    at: float
    label: str


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


@dataclass(frozen=True)
class Cell:
    """A device of the mesh, drawn at (`x`, `y`) in pixels."""

    x: int
    y: int
    number: int


@dataclass(frozen=True)
class MeshPicture:
    """The mesh as a grid in pixels: cells, the numbers along both axes (or a gap), and what was left out."""

    rows: int
    columns: int
    row_axis: str
    column_axis: str
    cells: list[Cell]
    row_labels: list[Tick]
    column_labels: list[Tick]
    cell: int
    left: int
    top: int
    width: int
    height: int
    summarised: bool


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
    # 12 digits take away what multiplying by 0.1 leaves behind (0.30000000000000004).
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


def _axis(marks: Sequence[tuple[float, float]]) -> list[Tick]:
    """Return ticks from (value, percent along the axis) pairs."""
    labels = tick_labels([value for value, _ in marks])
    return [Tick(at, label) for (_, at), label in zip(marks, labels, strict=True)]


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

    def pieces(points: Sequence[Point]) -> list[str]:
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

    has_mean = noisy and len(finite) > 2 * span
    lines = [Line("each step", "raw" if has_mean else "alone", pieces(list(zip(steps, values, strict=True))))]
    if has_mean:
        lines.append(Line("moving mean", "mean", pieces(list(zip(steps, mean, strict=True)))))
    if validation:
        lines.append(Line("validation sequences, during training", "held", pieces(validation)))
    return LineChart(
        title=title,
        unit=unit,
        x_ticks=_axis([(tick, share(tick, *x_domain)) for tick in ticks(*x_domain, least=1.0)]),
        y_ticks=_axis([(tick, round(100 - share(tick, *y_domain), 3)) for tick in ticks(*y_domain)]),
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
) -> LineChart | None:
    """Lay out several lines over a number that doubles from point to point, from zero upwards.

    Args:
        title: what is shown.
        unit: its unit, shown next to the title.
        x_name: what the number counts.
        series: a name and (number, value) pairs for each line, the numbers positive and ascending.
        level: name and value of a level line, such as a limit.

    Returns:
        The chart, or None where there is no value.
    """
    points = [point for _, values in series for point in values]
    if not points:
        return None
    numbers = sorted({number for number, _ in points})
    low, high = math.log2(numbers[0]), math.log2(numbers[-1])
    x_domain = (low, high) if low < high else (low - 0.5, high + 0.5)
    y_domain = widened(0.0, max([value for _, value in points] + ([level[1]] if level else [])))

    def place(number: float, value: float) -> Point:
        return share(math.log2(number), *x_domain), round(100 - share(value, *y_domain), 3)

    lines, dots = [], []
    for index, (name, values) in enumerate(series):
        style = f"series-{index % SERIES}"
        placed = [place(*point) for point in values]
        lines.append(Line(name, style, [" ".join(f"{x * 10:.1f},{y * 10:.1f}" for x, y in placed)]))
        dots += [
            Dot(x, y, f"{name}, {number:,.0f} {x_name}: {value:.4g}", style)
            for (x, y), (number, value) in zip(placed, values, strict=True)
        ]
    if level:
        y = 1000 - share(level[1], *y_domain) * 10
        lines.append(Line(level[0], "before", [f"0.0,{y:.1f} 1000.0,{y:.1f}"]))
    largest = max(points, key=lambda point: point[1])
    return LineChart(
        title=title,
        unit=unit,
        x_ticks=[Tick(share(math.log2(number), *x_domain), f"{number:,.0f}") for number in numbers],
        y_ticks=_axis([(tick, round(100 - share(tick, *y_domain), 3)) for tick in ticks(*y_domain)]),
        lines=lines,
        dots=dots,
        breaks=[],
        x_domain=x_domain,
        y_domain=y_domain,
        span=0,
        summary=f"{title} for {', '.join(name for name, _ in series)} over {numbers[0]:,.0f} to {numbers[-1]:,.0f} "
        f"{x_name}; at most {largest[1]:.4g} {unit}.",
        x_name=x_name,
        doubling=True,
        legend=True,
    )


def stacked_bars(bars: Sequence[tuple[str, list[tuple[str, bool, int]]]], unit: int) -> tuple[list[Bar], list[Tick]]:
    """Lay out stacked bars on one axis from zero.

    Args:
        bars: for each bar its name and its pieces (kind, hatched, bytes), in drawing order.
        unit: the bytes that one unit of the axis stands for.

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
    return drawn, _axis([(tick, share(tick, 0.0, high)) for tick in ticks(0.0, high)])


def mesh_picture(shape: Sequence[int], axis_names: Sequence[str]) -> MeshPicture:
    """Lay out a mesh of one or two axes as a grid, the first axis downwards; a long axis is shortened in the middle.

    The number in a cell is the device's place in the mesh, counted row by row.
    """
    rows, columns = (1, *shape)[-2:]
    names = ("", *axis_names)[-2:]
    # 16 columns of the smaller cells fit next to the memory chart; numbers of three digits fit into them.
    cell, gap = (26, 3) if 8 < columns <= MOST_DRAWN else (34, 4)
    left, top = 38, 46

    def places(count: int) -> list[int | None]:
        if count <= MOST_DRAWN:
            return list(range(count))
        return [*range(6), None, count - 2, count - 1]

    drawn_rows, drawn_columns = places(rows), places(columns)
    cells = [
        Cell(left + i * (cell + gap), top + j * (cell + gap), row * columns + column)
        for j, row in enumerate(drawn_rows)
        for i, column in enumerate(drawn_columns)
        if row is not None and column is not None
    ]

    def labels(drawn: list[int | None], start: int) -> list[Tick]:
        return [
            Tick(start + index * (cell + gap) + cell // 2, "\N{MIDLINE HORIZONTAL ELLIPSIS}" if n is None else f"{n}")
            for index, n in enumerate(drawn)
        ]

    return MeshPicture(
        rows=rows,
        columns=columns,
        row_axis=names[0],
        column_axis=names[1],
        cells=cells,
        row_labels=labels(drawn_rows, top),
        column_labels=labels(drawn_columns, left),
        cell=cell,
        left=left,
        top=top,
        width=left + len(drawn_columns) * (cell + gap),
        height=top + len(drawn_rows) * (cell + gap),
        summarised=None in drawn_rows or None in drawn_columns,
    )
