"""The optimizer's settings: schedule, accumulation, clipping, AdamW's own."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest

from stages.core.common.errors import ParamsError
from stages.core.finetune.optimizer import make_optimizer
from stages.core.finetune.trainer import check_length
from tests.support.tiny_runs import data, distance, settings, train


def test_the_same_settings_give_the_same_weights_and_another_seed_others(one_block, plain):
    assert distance(train(one_block, settings(batch_size=2))[1], plain[1]) == 0.0
    assert distance(train(one_block, settings(batch_size=2, seed=1))[1], plain[1]) > 0.0


def wanted_rate(shape, step, steps, warmup):
    """The formula of the schedule, written out again."""
    if step < warmup:
        return 0.01 * (step + 1) / warmup
    part = (step - warmup) / (steps - warmup)
    return 0.01 * {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[shape]


@pytest.mark.parametrize(("shape", "warmup"), [("constant", 3), ("linear", 0), ("linear", 2), ("cosine", 2)])
def test_the_learning_rate_follows_its_schedule(one_block, shape, warmup):
    wanted = settings(batch_size=1, schedule=shape, warmup_steps=warmup)
    rates = [row.learning_rate for row in train(one_block, wanted)[0].history.rows]
    assert len(rates) == 8
    assert rates == pytest.approx([wanted_rate(shape, step, 8, warmup) for step in range(8)], rel=1e-5)


def test_a_schedule_reaches_the_optimizer(one_block):
    """One step with a warm-up of 1000 moves the weights a thousandth of what one without moves them."""
    start = train(one_block, settings(batch_size=2, steps=1, learning_rate=1e-9))[1]
    full = train(one_block, settings(batch_size=2, steps=1))[1]
    slow = train(one_block, settings(batch_size=2, steps=1, warmup_steps=1000))[1]
    assert distance(slow, start) == pytest.approx(distance(full, start) / 1000, rel=0.05)


def unequal(count=7):
    """Sequences whose targets are one or eighteen in turn, as those of short and long responses are."""
    given = data(count)
    for split in given.values():
        split["weights"][:] = 0.0
        split["weights"][::2, 5] = 1.0
        split["weights"][1::2, 5:23] = 1.0
    return given


def packed():
    return data(7)


@pytest.mark.parametrize(
    ("given", "rank", "shape"),
    [
        (unequal, 2, (1, 1)),
        (unequal, 2, (1, 8)),
        (unequal, 0, (2, 2)),
        (unequal, 0, (4, 1)),
        (packed, 2, (2, 2)),
        (packed, 0, (1, 8)),
    ],
)
def test_accumulated_batches_are_one_batch_of_all_their_sequences(one_block, given, rank, shape):
    """Seven sequences: the last step of an epoch has three of its four batches."""
    wanted = {"epochs": 2, "rank": rank, "epsilon": 1e-3, "validate_every": 1}
    large, of_large = train(one_block, settings(batch_size=4, **wanted), given(), shape=shape)
    small, of_small = train(one_block, settings(batch_size=1, gradient_accumulation=4, **wanted), given(), shape=shape)
    assert large.history.steps == small.history.steps == 4
    for one, other in zip(large.history.rows, small.history.rows, strict=True):
        assert one.tokens == other.tokens
        for key in ("loss", "accuracy", "validation_loss"):
            assert getattr(one, key) == pytest.approx(getattr(other, key), rel=2e-5), key
    assert distance(of_small, of_large) < 1e-4
    assert small.metrics().loss_last == pytest.approx(large.metrics().loss_last, abs=1e-4)


@pytest.mark.parametrize("wanted", [{"lora_dropout": 0.5}, {"clip_norm": 1e-3}], ids=str)
def test_a_group_drops_and_clips_as_a_whole(one_block, wanted):
    """Each batch of a group drops by a mask of its own; the norm is that of the group's gradient."""
    changes = {"epsilon": 1e-3, "steps": 1, "learning_rate": 0.1, **wanted}
    large = train(one_block, settings(batch_size=4, **changes), unequal())[1]
    small = train(one_block, settings(batch_size=1, gradient_accumulation=4, **changes), unequal())[1]
    assert (distance(small, large) < 1e-5) == ("clip_norm" in wanted)


def test_steps_schedule_warm_up_validation_and_samples_count_updates(one_block):
    wanted = settings(
        batch_size=1, gradient_accumulation=3, epochs=2, schedule="linear", warmup_steps=2, validate_every=2
    )
    rows = train(one_block, wanted)[0].history.rows
    assert [row.epoch for row in rows] == [1, 1, 1, 2, 2, 2]
    assert [row.learning_rate for row in rows] == pytest.approx(
        [wanted_rate("linear", step, 6, 2) for step in range(6)], rel=1e-5
    )
    assert [row.step for row in rows if row.validation_loss is not None] == [2, 4, 6]
    assert train(one_block, wanted.model_copy(update={"steps": 4}))[0].history.steps == 4


def test_more_batches_than_an_epoch_has_are_not_accumulated(one_block):
    with pytest.raises(ParamsError, match=r"at most the batches of an epoch, 4\. Received: .*=5"):
        train(one_block, settings(batch_size=2, gradient_accumulation=5, epochs=3))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"warmup_steps": 4}, ["warmup_steps=4"]),
        ({"warmup_steps": 3, "steps": 4}, []),
        ({"early_stopping": 1}, ["early_stopping=1"]),
        ({"early_stopping": 1, "validate_every": 3}, []),
        ({"early_stopping": 1, "epochs": 2}, []),
        ({"steps": 5}, ["steps=5"]),
        ({"gradient_accumulation": 2, "warmup_steps": 2, "steps": 3}, ["warmup_steps=2", "steps=3"]),
    ],
    ids=str,
)
def test_a_setting_that_does_nothing_in_a_run_of_this_length_is_told_in_one_line(logged, changes, told):
    wanted = settings(**changes)
    per_epoch = math.ceil(4 / wanted.gradient_accumulation)
    total = min(wanted.epochs * per_epoch, wanted.steps or 10**9)
    check_length(wanted, batches=4, steps=total)
    assert len(logged()) == len(told)
    for line, name in zip(logged(), told, strict=True):
        assert f"Warning: finetune.{name} does nothing" in line and "\n" not in line


@pytest.mark.parametrize("changes", [{"beta_1": 0.5}, {"beta_2": 0.9}, {"epsilon": 1e-2}], ids=str)
def test_adams_own_settings_reach_the_weights(one_block, plain, changes):
    assert distance(train(one_block, settings(batch_size=2, **changes))[1], plain[1]) > 1e-4


def test_an_update_is_keras_formula_with_epsilon_outside_of_the_bias_correction(devices):
    optimizer = make_optimizer(settings(beta_1=0.8, beta_2=0.9, epsilon=0.5, weight_decay=0.0), 3)
    weight = keras.Variable(np.ones(3, "f4"))
    optimizer.build([weight])
    mean = square = 0.0
    value = np.ones(3)
    for step, gradient in enumerate(([1.0, -2.0, 3.0], [0.5, 0.5, -1.0]), 1):
        gradient = np.array(gradient)
        optimizer.apply([gradient.astype("f4")], [weight])
        mean, square = 0.8 * mean + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
        rate = 0.01 * math.sqrt(1 - 0.9**step) / (1 - 0.8**step)
        value = value - rate * mean / (np.sqrt(square) + 0.5)
    np.testing.assert_allclose(np.asarray(weight.value), value, rtol=1e-6)


def test_gradients_beyond_the_norm_are_scaled_down(one_block, plain):
    # Far below Adam's epsilon of 1e-7 a gradient moves nothing.
    start = train(one_block, settings(batch_size=2, learning_rate=1e-9))[1]
    clipped = train(one_block, settings(batch_size=2, clip_norm=1e-12))[1]
    assert distance(clipped, start) < 1e-3
    assert distance(plain[1], start) > 1e-2
