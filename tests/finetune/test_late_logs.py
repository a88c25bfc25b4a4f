"""Steps in flight: a run whose numbers are read late is the run whose numbers are read at once."""

from __future__ import annotations

import numpy as np
import pytest

from stages.core.common.errors import StageError
from stages.core.finetune import callback, late_logs
from stages.core.finetune.checkpoint import Store
from tests.support.tiny_runs import data, distance, settings, train

# 8 sequences in batches of 1: eight steps an epoch; what is due falls on steps of its own and on common ones.
WANTED = settings(batch_size=1, epochs=2, steps=13, validate_every=3, checkpoint_every=4, schedule="cosine")


@pytest.fixture(params=[0, 2], ids=["read at once", "read two steps later"])
def ahead(request, monkeypatch):
    monkeypatch.setitem(late_logs.AHEAD, "cpu", request.param)
    return request.param


@pytest.fixture
def in_flight(monkeypatch):
    """How many steps are in flight whenever one begins."""
    counts = []
    begin = callback.TrainingCallback.on_train_batch_begin

    def counted(self, batch, logs=None):
        counts.append(self.begun - self.history.steps)
        begin(self, batch, logs)

    monkeypatch.setattr(callback.TrainingCallback, "on_train_batch_begin", counted)
    return counts


def without_times(result):
    timed = {"tokens_per_second", "positions_per_second"}
    return [row.model_dump(exclude=timed) for row in result.history.rows]


@pytest.fixture(scope="module")
def at_once(one_block):
    return train(one_block, WANTED)


def test_when_numbers_are_read_changes_none_of_them(one_block, at_once, ahead, in_flight, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path))
    saved = []
    monkeypatch.setattr(Store, "save", lambda self, step, arrays, state: saved.append((step, len(state["rows"]))))
    result, weights = train(one_block, WANTED, store=Store("a run", 2))
    assert without_times(result) == without_times(at_once[0])
    assert distance(weights, at_once[1]) == 0.0
    assert saved == [(4, 4), (8, 8), (12, 12)], "a checkpoint holds all steps up to it, and none after"
    assert len(result.history.step_seconds) == 13 and min(result.history.step_seconds) > 0.0
    assert max(in_flight) == ahead
    # The steps after a validation, a checkpoint and an epoch's end find none in flight.
    assert {in_flight[step] for step in (0, 3, 4, 6, 8, 9, 12)} == {0}


def test_a_step_that_diverges_is_named_however_late_it_is_read(one_block, ahead):
    given = data()
    given["train"]["weights"][5] = np.nan
    step = int(np.flatnonzero(np.random.default_rng([0, 0]).permutation(8) == 5)[0]) + 1
    with pytest.raises(StageError, match=rf"Training diverged.* Received: step={step},"):
        train(one_block, WANTED.model_copy(update={"validate_every": None}), given)
