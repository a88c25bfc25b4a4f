"""What differs between processes, who is behind, which rows each has, and how the rehearsal's model is made small."""

from __future__ import annotations

import numpy as np
import pytest

from stages.core.common.errors import StageError
from stages.core.fetch.catalog import architecture
from stages.core.processes.behind import behind
from stages.core.processes.facts import difference
from stages.core.processes.group import Group, set_current
from stages.core.records.layout import MeshShape
from stages.core.rehearse.rehearsing import shape_for
from stages.core.rehearse.shrinking import RandomWeights, tiny
from stages.core.sharding.hosts import check_split, held_rows
from stages.core.sharding.named_layouts import auto

NAMES = {0: "process 0", 1: "process 1", 2: "process 2"}


@pytest.fixture
def group():
    """Makes this process one of several, as far as rows are concerned."""
    made = Group()
    set_current(made)
    yield made
    set_current(Group())


def test_the_one_that_differs_is_named_and_of_two_the_second():
    same = {"Python": "3.11", "the package jax": "0.10.2"}
    other = {**same, "the package jax": "0.9"}
    assert difference([same] * 3, list(NAMES.values())) is None
    found = difference([other, same, same], list(NAMES.values()))
    assert found == "All processes must have the same the package jax. Received: 0.9 on process 0; 0.10.2 on the others"
    assert "0.9 on process 1" in difference([same, other], ["process 0", "process 1"])
    assert "absent on process 1" in difference([same, {"Python": "3.11"}], ["process 0", "process 1"])


def state(begun: int, age: float, limit: float = 45) -> dict:
    return {"begun": begun, "what": f"step {begun}", "age": age, "limit": limit}


def test_the_process_that_began_the_least_is_the_stuck_one():
    assert behind({0: state(8, 60), 1: state(8, 60), 2: state(7, 61)}, NAMES) == (
        2,
        "process 2 is stuck, and the others wait for it: step 7 has not ended within 45 s.",
    )
    assert behind({0: state(8, 60), 1: state(8, 60), 2: state(7, 44)}, NAMES) is None
    assert "All processes are stuck: step 8" in behind({number: state(8, 50) for number in NAMES}, NAMES)[1]
    assert behind({number: state(1, 50, 3600) for number in NAMES}, NAMES) is None


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_rows_of_all_processes_are_the_batch_and_those_of_one_row_of_the_mesh_are_the_same(shape, count, group):
    mesh = MeshShape(shape)
    group.count = count
    rows = np.arange(16)
    held = []
    for group.index in range(count):
        held.append(rows[held_rows(16, mesh)])
    assert set(np.concatenate(held)) == set(rows)
    sharing = max(1, shape[1] * count // 8)
    assert sum(map(len, held)) == 16 * sharing
    for start in range(0, count, sharing):
        assert all(np.array_equal(held[start], each) for each in held[start : start + sharing])


@pytest.mark.parametrize(("shape", "count"), [((2, 3), 3), ((1, 4), 3), ((1, 2), 4)])
def test_processes_that_would_split_a_row_of_the_mesh_unevenly_are_refused(shape, count):
    with pytest.raises(StageError, match=rf"Received: mesh.shape=\[{shape[0]}, {shape[1]}\]"):
        check_split(MeshShape(shape), count)


@pytest.mark.parametrize("axis", [1, 3, 4, 8])
@pytest.mark.parametrize("preset", ["gemma_2b_en", "gemma2_9b_en", "gemma3_270m", "gemma3_27b_text"])
def test_a_tiny_model_is_split_as_the_real_one_is(preset: str, axis: int):
    real = architecture(preset)
    small = tiny(real, axis)
    mesh = MeshShape((1, axis))
    assert small.config["hidden_dim"] <= 256
    assert [(rule.pattern, rule.spec) for rule in auto(small, mesh).rules] == [
        (rule.pattern, rule.spec) for rule in auto(real, mesh).rules
    ]


def test_a_rehearsal_has_the_settings_mesh_or_one_like_it():
    assert shape_for([2, 4], 8) == [2, 4]
    assert shape_for([8, 8], 8) == [1, 8]
    assert shape_for([1, 8], 4) == [1, 4]


def test_random_weights_are_the_same_in_parts():
    source = RandomWeights({"a/kernel": (4, 6)})
    whole = source.read("a/kernel", (slice(None), slice(None)))
    assert np.array_equal(source.read("a/kernel", (slice(2, 4), slice(None))), whole[2:4])
