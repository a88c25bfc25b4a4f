"""Units, ticks and geometry."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.records.sharding import Sharding
from stages.core.report import axes, figures, line_charts, mesh_picture
from stages.core.report import text as text_form
from tests.support.pages import MINUS
from tests.support.report_outputs import sharding


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("peak_host_bytes", 0, "0 B"),
        ("peak_host_bytes", 1023, "1,023 B"),
        ("peak_host_bytes", 1024, "1.00 KiB"),
        ("peak_host_bytes", 2**30 - 1, "1.00 GiB"),
        ("peak_host_bytes", 5 * 2**50, "5,120 TiB"),
        ("step_seconds_median", 0.163, "163 ms"),
        ("seconds", 119.96, "120 s"),
        ("seconds", 3725, "62 min 5 s"),
        ("seconds", 7325, "2 h 2 min"),
        ("tokens_per_second", 12345.6, "12,346 tokens/s"),
        ("replicated_fraction", 0.00152, "0.15 %"),
        ("replicated_fraction", 0.0, "0.0 %"),
        ("loss", 3.59494, "3.595"),
        ("perplexity", 1234.5, "1,234.50"),
        ("steps", 223, "223"),
        ("total_parameters", 8548748288, "8,548,748,288"),
        ("v5e.fits", True, "True"),
        ("loss", None, "\N{EN DASH}"),
        ("preset", "gemma_7b_en", "gemma_7b_en"),
    ],
)
def test_a_metric_is_written_with_the_unit_its_key_tells(key, value, shown):
    assert text_form.quantity(key, value).replace("\N{NO-BREAK SPACE}", " ") == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(15.84, "+15.8"), (-15.84, f"{MINUS}15.8"), (0.04, "0.0"), (-0.04, "0.0"), (-1234, f"{MINUS}1,234.0")],
)
def test_a_change_bears_its_sign_unless_it_rounds_to_zero(value, shown):
    assert text_form.signed(value, 1) == shown


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_even_and_inside_the_axis_that_they_end(low, length):
    start, end = axes.widened(low, low + length)
    marks = axes.ticks(start, end)
    assert start <= low + 1e-6 * length or math.isclose(start, low)
    assert end >= low + length - 1e-6 * length or math.isclose(end, low + length)
    assert 2 <= len(marks) <= 12
    assert (marks[0], marks[-1]) == (pytest.approx(start), pytest.approx(end))


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([3.0, 3.5, 4.0], ["3.0", "3.5", "4.0"]),
        ([0.0, 10000.0, 20000.0], ["0", "10,000", "20,000"]),
        ([-0.5, 0.0, 0.5], [f"{MINUS}0.5", "0.0", "0.5"]),
        ([0.0, 1e-5, 2e-5], ["0", f"1e{MINUS}5", f"2e{MINUS}5"]),
        ([0.0, 0.0005, 0.001], ["0.0000", "0.0005", "0.0010"]),
        ([7.0], ["7"]),
    ],
)
def test_ticks_are_written_with_equal_decimals(values, labels):
    assert axes.tick_labels(values) == labels


def test_the_moving_mean_is_not_drawn_to_zero_at_its_start_and_passes_over_gaps():
    assert line_charts.smoothed([4.0] * 20, span=10) == pytest.approx([4.0] * 20)
    assert line_charts.smoothed([math.nan, 4.0, math.nan, 4.0], span=10)[1:] == pytest.approx([4.0] * 3)
    assert math.isnan(line_charts.smoothed([math.nan, 4.0], span=10)[0])


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=400), st.integers(4, 100))
def test_thinning_keeps_the_outline(values, most):
    points = list(enumerate(values))
    kept = line_charts.thinned(points, most)
    assert len(kept) <= max(most, 1)
    assert kept == sorted(kept)
    assert {min(values), max(values)} <= {value for _, value in kept}


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf]])
def test_no_chart_is_drawn_of_no_numbers(values):
    assert line_charts.line_chart("Loss", "", range(len(values)), values) is None


def test_a_chart_of_one_step_or_of_a_constant_has_room():
    chart = line_charts.line_chart("Loss", "", [1], [0.0])
    assert chart.y_domain[0] < 0 < chart.y_domain[1]
    assert chart.lines[0].pieces == ["500.0,500.0"]


def test_steps_are_never_marked_between_two_steps():
    chart = line_charts.line_chart("Loss", "", [1, 2], [3.0, 2.0])
    assert [tick.label for tick in chart.x_ticks] == ["1", "2"]


def test_memory_is_stacked_by_kind_with_the_replicated_part_apart():
    tuned = Sharding.model_validate(sharding(tuned=True))
    bar = figures.memory({"tuned": tuned})["bars"][0]
    assert bar.total == tuned.bytes_per_device
    assert [(s.kind, s.hatched) for s in bar.segments] == [
        (kind, hatched) for kind in ("weight", "lora", "optimizer") for hatched in (False, True)
    ]
    assert sum(s.bytes for s in bar.segments if s.hatched) == tuned.replicated_bytes
    for before, after in zip(bar.segments, bar.segments[1:], strict=False):
        assert before.x + before.width == pytest.approx(after.x, abs=0.01)
    assert bar.segments[-1].x + bar.segments[-1].width <= 100


@pytest.mark.parametrize(
    ("shape", "cells", "summarised"),
    [([1, 8], 8, False), ([8], 8, False), ([16, 16], 256, False), ([17, 1], 8, True), ([32, 64], 64, True)],
)
def test_a_mesh_up_to_sixteen_by_sixteen_is_drawn_whole_and_a_larger_one_by_its_ends(shape, cells, summarised):
    picture = mesh_picture.mesh_picture(shape, ["batch", "model"][-len(shape) :])
    assert len(picture.cells) == cells
    assert picture.summarised is summarised
    assert picture.cells[-1].number == math.prod(shape) - 1
    assert max(cell.x for cell in picture.cells) + picture.cell <= picture.width
    assert max(cell.y for cell in picture.cells) + picture.cell <= picture.height
