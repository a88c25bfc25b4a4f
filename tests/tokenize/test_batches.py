"""Batches: every sequence once an epoch, in a seeded order, nothing dropped and nothing counted twice."""

from __future__ import annotations

import numpy as np
import pytest

from stages.core.common.errors import StageError
from stages.core.common.paths import Paths
from stages.core.sharding.mesh import MeshShape
from stages.core.tokenize.batches import Batches
from stages.core.tokenize.store import read_sequences
from tests.support.tiny_models import sequences


def seen(batches) -> list[int]:
    """The first token of each row that has weight, over an epoch."""
    rows = []
    for step in range(len(batches)):
        (batch,) = batches[step]
        weighty = batch["weights"].any(axis=1)
        rows += batch["token_ids"][weighty, 1].tolist()
    return rows


@pytest.mark.parametrize(
    ("count", "size", "shape", "padded"), [(7, 2, (1, 8), 2), (7, 2, (4, 2), 4), (5, 8, (8, 1), 8)]
)
def test_every_window_is_seen_once_and_what_is_missing_is_padded_without_weight(devices, count, size, shape, padded):
    data = sequences(count)
    batches = Batches(data, size, MeshShape(shape), seed=0)
    for step in range(len(batches)):
        assert all(values.shape[0] == padded for values in batches[step][0].values())
    assert sorted(seen(batches)) == sorted(data["token_ids"][:, 1].tolist())


@pytest.mark.parametrize(("count", "size"), [(3, 64), (3, 10**9), (1, 8)])
def test_a_batch_is_no_larger_than_the_sequences_there_are(devices, count, size):
    batches = Batches(sequences(count), size, MeshShape((1, 1)))
    assert len(batches) == 1
    assert len(batches[0][0]["token_ids"]) == count
    assert seen(batches) == sequences(count)["token_ids"][:, 1].tolist()


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 2)], ids=str)
@pytest.mark.parametrize(("count", "size", "group"), [(7, 1, 4), (8, 2, 2), (5, 2, 3), (9, 3, 2)])
def test_a_group_has_the_sequences_of_one_large_batch_and_ends_with_the_epoch(devices, count, size, group, shape):
    data = sequences(count)
    grouped = Batches(data, size, MeshShape(shape), seed=5, accumulation=group)
    large = Batches(data, size * group, MeshShape((1, 1)), seed=5)
    assert len(grouped) == len(large)
    for step in range(len(grouped)):
        (got,), (wanted,) = grouped[step], large[step]
        assert got["token_ids"].shape[1:] == (group, 32)
        assert got["token_ids"].shape[0] % shape[0] == 0
        weighty = got["weights"].any(axis=2)
        of_group = got["token_ids"].swapaxes(0, 1)[weighty.T]
        assert of_group.tolist() == wanted["token_ids"][wanted["weights"].any(axis=1)].tolist()
        assert grouped.tokens_of(0, step) == got["weights"].sum()
    assert grouped.tokens == data["weights"].sum()


def test_epochs_that_are_never_reached_cost_nothing(devices):
    batches = Batches(sequences(9), 2, MeshShape((1, 1)), seed=0)
    assert sorted(np.concatenate([batches.rows(10**9, step) for step in range(5)])) == list(range(9))
    assert batches.rows(0, 0).tolist() == np.random.default_rng([0, 0]).permutation(9)[:2].tolist()


def test_the_order_is_the_seeds_and_another_each_epoch(devices):
    data = sequences(9)
    first, again, other = (Batches(data, 2, MeshShape((1, 1)), seed=seed) for seed in (3, 3, 4))
    orders = [seen(first), seen(again), seen(other)]
    assert orders[0] == orders[1] != orders[2]
    first.epoch = 1
    assert seen(first) != orders[0]
    assert seen(Batches(data, 2, MeshShape((1, 1)))) == data["token_ids"][:, 1].tolist()


def test_a_split_without_a_token_to_learn_is_told(devices, tmp_path):
    (tmp_path / "data/tokens").mkdir(parents=True)
    data = sequences(3)
    np.savez(tmp_path / "data/tokens/validation.npz", **{**data, "weights": np.zeros_like(data["weights"])})
    with pytest.raises(StageError, match=r"at least one token to train on\. Received: none in 3 sequences"):
        read_sequences(Paths(tmp_path, tmp_path), "validation")


def test_a_split_without_a_sequence_is_refused(devices, tmp_path):
    (tmp_path / "data/tokens").mkdir(parents=True)
    np.savez(tmp_path / "data/tokens/train.npz", token_ids=np.zeros((0, 8), np.int32))
    with pytest.raises(StageError, match="at least one sequence"):
        read_sequences(Paths(tmp_path, tmp_path), "train")
