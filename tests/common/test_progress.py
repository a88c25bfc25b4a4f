"""Progress in a log: a line from time to time, with what is left."""

from __future__ import annotations

from itertools import count

import pytest

from stages.core.common import progress
from stages.core.common.progress import ProgressLog


@pytest.fixture
def clock(monkeypatch):
    """Let ten seconds pass at each look at the clock."""
    times = count(0, 10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))


def test_a_log_gets_a_line_every_half_minute_with_the_minutes_that_are_left(clock, logged):
    shown = ProgressLog("Step", total=100)
    for step in range(1, 8):
        shown.show(step, f"loss {step}.0")
    # 30 s for 3 steps, so 97 more take 970 s.
    assert logged() == [
        "Step 3 of 100, loss 3.0, about 16 min left.",
        "Step 6 of 100, loss 6.0, about 16 min left.",
    ]


def test_what_another_process_has_done_does_not_make_this_one_seem_faster(clock, logged):
    shown = ProgressLog("Step", total=100, done=90)
    for step in range(91, 94):
        shown.show(step, "loss 1.0")
    assert logged() == ["Step 93 of 100, loss 1.0, about 1 min left."]


def test_at_a_terminal_the_bar_is_enough(clock, logged, monkeypatch):
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True, raising=False)
    shown = ProgressLog("Step", total=10)
    for step in range(1, 10):
        shown.show(step, "loss 1.0")
    assert logged() == []
