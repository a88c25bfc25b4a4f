"""Which tokens the settings leave, held to definitions in numpy; tokens are drawn as often as they are likely."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from stages.core.generate.choosing import Drawing, choose, left

ROWS, VOCABULARY = 3, 300
SETTINGS = [
    {"top_k": 7},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.02},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.03, "temperature": 1.7},
    {"top_k": VOCABULARY + 5, "top_p": 1.0, "min_p": 0.0},
]


@pytest.fixture(scope="module")
def logits(devices: int) -> np.ndarray:
    """Logits with both signs, and some equal ones."""
    z = np.random.default_rng(0).normal(0, 3, (ROWS, VOCABULARY)).astype("f4")
    z[:, 50:60] = z[:, 40:50]
    return z


def probabilities(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def allowed(z, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The tokens of one row that may be drawn, by the definitions: each of those left by the one before it."""
    z = z.astype("f8") / temperature
    if top_k is not None and top_k < len(z):
        z = np.where(z >= np.sort(z)[-top_k], z, -np.inf)
    if top_p is not None:
        p = probabilities(z)
        z = np.where([p[p > each].sum() < top_p for each in p], z, -np.inf)
    if min_p is not None:
        p = probabilities(z)
        z = np.where(p >= min_p * p.max(), z, -np.inf)
    return set(np.flatnonzero(np.isfinite(z)))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_left_is_what_the_definitions_leave(logits, settings):
    choice = Drawing(**{"temperature": 1.0, **settings}).as_choice(VOCABULARY, None)
    found = np.asarray(jax.jit(left)(logits / choice.temperature, choice))
    expected = [allowed(row, **settings) for row in logits]
    assert [set(np.flatnonzero(np.isfinite(row))) for row in found] == expected
    # What is left keeps its logits, and so its probabilities relative to each other.
    kept = np.isfinite(found)
    np.testing.assert_array_equal(found[kept], (logits / choice.temperature)[kept])


def test_the_settings_together_leave_fewer_tokens_than_each_alone(logits):
    sizes = [len(allowed(logits[0], **each)) for each in SETTINGS]
    assert 1 < min(sizes) < max(sizes) == VOCABULARY


def draw(z, count=1, seen=None, pieces=None, **settings):
    """Tokens drawn for one row of logits, each with a key of its own."""
    keys = jax.random.split(jax.random.key(0), count)
    choice = Drawing(**settings).as_choice(len(z), pieces)
    rows = np.broadcast_to(z, (count, len(z)))
    return np.asarray(
        choose(rows, np.broadcast_to(np.zeros(len(z), bool) if seen is None else seen, rows.shape), keys, choice)
    )


def test_tokens_are_drawn_as_often_as_they_are_likely(devices):
    z = np.array([2.0, 0.0, 1.0, -1.0], "f4")
    drawn = draw(z, 4000, temperature=2.0)
    expected = 4000 * probabilities(z / 2.0)
    counts = np.bincount(drawn, minlength=4)
    # Chi squared with three degrees of freedom is above 16.3 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 16.3
    # Of the nucleus only, again as likely as they are there.
    inside = np.bincount(draw(z, 4000, temperature=1.0, top_p=0.7), minlength=4)
    assert inside[1] == inside[3] == 0
    assert inside[0] / 4000 == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.04)


def test_a_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_negative(devices):
    z = np.array([3.0, 2.0, -1.0, -1.5], "f4")
    everything, first = np.ones(4, bool), np.array([True, False, False, False])
    assert draw(z, repetition_penalty=1.4, seen=first).item() == 0
    assert draw(z, repetition_penalty=1.6, seen=first).item() == 1
    assert draw(z - 3.5, repetition_penalty=1.4, seen=first).item() == 0
    assert draw(z - 3.5, repetition_penalty=4.0, seen=first).item() == 1
    assert draw(z, repetition_penalty=5.0, seen=everything).item() == 0


def test_the_likeliest_token_is_one_with_a_piece(devices):
    z = np.array([0.0, 1.0, 2.0, 3.0], "f4")
    assert draw(z).item() == 3
    assert draw(z, pieces=2).item() == 1
    assert set(draw(z, 50, pieces=2, temperature=10.0)) == {0, 1}
