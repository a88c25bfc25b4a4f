"""The layout engine: every mistake of a rule stops with one message, and a right rule splits what it says."""

from __future__ import annotations

import math
import re

import pytest

from stages.core.common.errors import StageError
from stages.core.records.layout import NamedLayout
from stages.core.sharding.layout import (
    Rule,
    Weight,
    axes_of,
    check_replication,
    format_spec,
    lay_out,
    lay_out_slot,
    place,
    replicated_fraction,
    resolve,
    split_over_batch,
)
from stages.core.sharding.mesh import MeshShape

MESH = MeshShape((2, 4))
QUERY = Weight("decoder_block_0/attention/query/kernel", (4, 64, 16), "float32")
SCALE = Weight("decoder_block_0/pre_ffw_norm/scale", (64,), "float32")


def test_a_rule_splits_the_dimension_it_names():
    placement = resolve([Rule(".*query/kernel", ("model", None, None))], [QUERY, SCALE], MESH)
    assert placement[0].shard_shape == (1, 64, 16)
    assert placement[0].bytes_per_device == 1 * 64 * 16 * 4
    assert placement[1].rule is None
    assert placement[1].shard_shape == (64,)


def test_a_dimension_over_both_axes_is_split_by_their_product():
    placement = place(QUERY, Rule(".*", (None, ("batch", "model"), None)), MESH)
    assert placement.shard_shape == (4, 8, 16)


CASES = {
    "a pattern that is no regular expression": (Rule("query(", (None,) * 3), "must be a regular expression"),
    "a rule that matches nothing": (Rule("decoder_block.*quary/kernel", ("model", None, None)), "matches nothing"),
    "a part of a path only": (Rule("query/kernel", ("model", None, None)), "matches nothing"),
    "too few axes": (Rule(".*query/kernel", ("model", None)), "one entry for each of the weight's 3 dimensions"),
    "an unknown axis": (Rule(".*query/kernel", ("data", None, None)), "'data' is not a mesh axis"),
    "an axis twice": (Rule(".*query/kernel", ("model", "model", None)), "is there twice"),
    "an axis twice in one dimension": (Rule(".*query/kernel", (("model", "model"), None, None)), "is there twice"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_rule_stops_and_names_rule_and_mesh(case: str):
    rule, message = CASES[case]
    with pytest.raises(StageError, match=re.escape(message)) as raised:
        resolve([rule], [QUERY, SCALE], MESH)
    assert rule.pattern in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_dimension_that_the_axis_does_not_divide_is_named():
    with pytest.raises(StageError, match="of size 4 must be divisible by the 8 devices") as raised:
        resolve([Rule(".*query/kernel", ("model", None, None))], [QUERY], MeshShape((1, 8)))
    for part in (QUERY.path, "(4, 64, 16)", ".*query/kernel", "(batch=1, model=8)"):
        assert part in str(raised.value)


def test_two_rules_on_one_weight_are_both_named():
    rules = [Rule(".*query/kernel", ("model", None, None)), Rule(".*attention.*", ("model", None, None))]
    with pytest.raises(StageError, match="one layout rule only") as raised:
        resolve(rules, [QUERY], MESH)
    assert rules[0].pattern in str(raised.value)
    assert rules[1].pattern in str(raised.value)


@pytest.mark.parametrize("pattern", [".*query/kernel", "decoder_block_\\d+/attention/query/kernel", "a|.*kernel"])
@pytest.mark.parametrize("path", [QUERY.path, QUERY.path.replace("kernel", "lora_kernel_a"), SCALE.path, "a", "ab"])
def test_rules_mean_the_same_under_search_and_fullmatch(pattern: str, path: str):
    anchored = Rule(pattern, ()).anchored
    assert bool(re.search(anchored, path)) == bool(re.fullmatch(anchored, path)) == bool(re.fullmatch(pattern, path))


def test_replication_is_counted_over_the_model_axis_only():
    placements = resolve([Rule(".*query/kernel", ("model", None, None))], [QUERY, SCALE], MESH)
    assert replicated_fraction(placements, MESH) == pytest.approx(256 / (256 + 16384))
    assert replicated_fraction(placements, MeshShape((8, 1))) == 0.0


def test_too_much_replication_stops_and_lists_the_largest():
    placements = resolve([], [QUERY, SCALE], MESH)
    with pytest.raises(StageError, match="Largest: decoder_block_0/attention/query/kernel") as raised:
        check_replication(placements, MESH, 0.02)
    assert "along the axis 'model'" in str(raised.value)
    assert check_replication(placements, MESH, 1.0) == 1.0


def test_a_spec_is_written_as_jax_writes_it():
    assert format_spec((None, "model", ("batch", "model"))) == "PartitionSpec(None, 'model', ('batch', 'model'))"


OVER_BATCH = {
    "a dimension that no axis splits": (QUERY, ("model", None, None), ("model", "batch", None), 1),
    "not the last one": (Weight("linear", (64, 16), "float32"), ("model", None), (("model", "batch"), None), 0),
    "the last one if no other divides": (Weight("linear", (4, 16), "float32"), ("model", None), ("model", "batch"), 1),
    "the longer one": (Weight("output", (8, 16, 64), "float32"), (None, None, "model"), (None, "batch", "model"), 1),
    "nothing that does not divide": (Weight("odd", (3, 5), "float32"), (None, None), (None, None), None),
    "no norm scale": (SCALE, (None,), (None,), None),
    "nothing twice": (QUERY, ("batch", None, "model"), ("batch", None, "model"), None),
}


@pytest.mark.parametrize("case", OVER_BATCH)
def test_the_batch_axis_splits(case: str):
    weight, rule, spec, dimension = OVER_BATCH[case]
    found = split_over_batch(place(weight, Rule(".*", rule), MESH), MESH)
    assert (found.spec, found.over_batch, found.used) == (spec, dimension, rule)
    parts = [MESH.sizes[axis] for entry in spec for axis in axes_of(entry)]
    assert found.bytes_per_device * math.prod(parts) == weight.bytes


@pytest.mark.parametrize(("mode", "weight", "slot"), [("none", 1, 1), ("optimizer", 1, 2), ("weights", 2, 2)])
def test_a_layout_splits_weights_or_slots_over_the_batch_axis(mode, weight, slot):
    layout = NamedLayout("rules", (Rule(".*kernel", ("model", None, None)),), shard_over_batch=mode)
    (placed,) = lay_out(layout, [QUERY], MESH)
    assert placed.bytes_per_device * 4 * weight == QUERY.bytes
    assert lay_out_slot(layout, QUERY, placed, MESH).bytes_per_device * 4 * slot == QUERY.bytes
