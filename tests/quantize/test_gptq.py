"""Codes that make up for each other's errors: far better where inputs are alike, and the nearest where they are not."""

from __future__ import annotations

import numpy as np
import pytest

from stages.core.load.quantizing import in_groups, values_of_groups
from stages.core.quantize.gptq import factor, output_error, rounded

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((96, 24)).astype(np.float32)
# Ninety-six inputs that are sums of eight numbers, and a little of their own.
ALIKE = RANDOM.standard_normal((512, 8)) @ RANDOM.standard_normal((8, 96)) + 0.1 * RANDOM.standard_normal((512, 96))


def moment(inputs: np.ndarray) -> np.ndarray:
    return (inputs.T @ inputs).astype(np.float32)


def test_of_inputs_that_have_nothing_in_common_each_weight_gets_the_nearest_code():
    found = rounded(WEIGHT, factor(np.diag(np.linspace(1, 9, 96)).astype(np.float32)))
    for one, other in zip(found, in_groups(WEIGHT), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_of_inputs_that_are_alike_the_outputs_are_several_times_nearer():
    h = moment(ALIKE)
    chosen, nearest = (values_of_groups(*codes) for codes in (rounded(WEIGHT, factor(h)), in_groups(WEIGHT)))
    outputs = [
        np.square(ALIKE @ (WEIGHT - values)).sum() / np.square(ALIKE @ WEIGHT).sum() for values in (chosen, nearest)
    ]
    assert outputs[0] < outputs[1] / 3
    assert [output_error(WEIGHT, values, h) for values in (chosen, nearest)] == pytest.approx(outputs, rel=1e-3)


def test_a_channel_is_rounded_without_a_look_at_the_others():
    """So a device could round its own part alone, to the same codes."""
    upper = factor(moment(ALIKE))
    whole, part = rounded(WEIGHT, upper), rounded(WEIGHT[:, 5:9], upper)
    for one, other in zip(whole, part, strict=True):
        np.testing.assert_array_equal(one[:, 5:9], other)


def test_inputs_that_are_always_zero_do_no_harm():
    inputs = ALIKE.copy()
    inputs[:, 10:20] = 0
    codes, scale, offset = rounded(WEIGHT, factor(moment(inputs)))
    assert np.isfinite(values_of_groups(codes, scale, offset)).all()
    nothing = rounded(WEIGHT, factor(np.zeros((96, 96), np.float32)))
    np.testing.assert_array_equal(nothing[0], in_groups(WEIGHT)[0])
