"""How varied texts are, on texts where one can count."""

from __future__ import annotations

import pytest

from stages.core.generate.diversity import distinct, metrics, repeated


def test_distinct_sequences_are_counted_over_all_texts():
    rows = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(rows, 1) == 3 / 7
    assert distinct(rows, 2) == 3 / 5
    assert distinct(rows, 4) == 1.0
    assert distinct(rows, 5) is None


def test_repetitions_are_counted_within_each_text():
    loop, plain = [1, 2] * 5, list(range(10))
    assert repeated([loop]) == pytest.approx(1 - 2 / 7)
    assert repeated([plain, plain]) == 0.0
    assert repeated([loop, plain, [1, 2, 3]]) == pytest.approx((1 - 2 / 7) / 2)
    assert repeated([[1, 2, 3]]) is None


def test_the_metrics_leave_out_what_no_text_is_long_enough_for():
    found = metrics(2, [[1, 2], []], 0.5)
    assert found.content() == {
        "prompts": 2,
        "tokens": 2,
        "tokens_per_second": 4.0,
        "distinct_1_fraction": 1.0,
        "distinct_2_fraction": 1.0,
    }
