"""Batches: every window once an epoch, in a seeded order, nothing dropped and nothing counted twice."""

from __future__ import annotations

import numpy as np
import pytest

from stages.core.mesh import MeshShape
from tests.models import windows


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
    from stages.core.batches import Batches

    data = windows(count)
    batches = Batches(data, size, MeshShape(shape), seed=0)
    for step in range(len(batches)):
        assert all(values.shape[0] == padded for values in batches[step][0].values())
    assert sorted(seen(batches)) == sorted(data["token_ids"][:, 1].tolist())


def test_the_order_is_the_seeds_and_another_each_epoch(devices):
    from stages.core.batches import Batches

    data = windows(9)
    first, again, other = (Batches(data, 2, MeshShape((1, 1)), seed=seed, epochs=2) for seed in (3, 3, 4))
    orders = [seen(first), seen(again), seen(other)]
    assert orders[0] == orders[1] != orders[2]
    first.epoch = 1
    assert seen(first) != orders[0]
    assert seen(Batches(data, 2, MeshShape((1, 1)))) == data["token_ids"][:, 1].tolist()


def test_a_split_without_a_window_is_told(devices, tmp_path):
    from stages.core.batches import read_windows
    from stages.core.errors import StageError
    from stages.core.paths import Paths

    (tmp_path / "data/tokens").mkdir(parents=True)
    np.savez(tmp_path / "data/tokens/train.npz", token_ids=np.zeros((0, 8), np.int32))
    with pytest.raises(StageError, match="at least one window"):
        read_windows(Paths(tmp_path, tmp_path), "train")
