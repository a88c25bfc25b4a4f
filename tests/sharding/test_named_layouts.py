"""The named layouts, for every Gemma of the facts table and every mesh, without a byte of weights."""

from __future__ import annotations

import re

import pytest
from ruamel.yaml import YAML

from stages.core.common.errors import StageError
from stages.core.config.schema import Layout
from stages.core.sharding.layout import (
    Rule,
    check_adapters,
    check_replication,
    format_spec,
    replicated_fraction,
    resolve,
)
from stages.core.sharding.mesh import MeshShape
from stages.core.sharding.named_layouts import auto, make_layout, replication_advice, tutorial
from tests.support.declared import GEMMAS, architecture, declared_weights
from tests.support.repository import ROOT

MESHES = [(batch, total // batch) for total in (1, 2, 4, 8, 16, 32) for batch in (1, 2, 4, 8, 16, 32) if batch <= total]


@pytest.mark.parametrize("preset", GEMMAS)
def test_the_parameter_count_of_every_preset_is_the_registrys(devices: int, preset: str):
    total = 0
    for weight in declared_weights(preset):
        size = 1
        for dimension in weight.shape:
            size *= dimension
        total += size
    assert total == GEMMAS[preset]["params"]


@pytest.mark.parametrize("preset", GEMMAS)
def test_auto_splits_nearly_everything_of_every_gemma_on_every_mesh(devices: int, preset: str):
    weights = declared_weights(preset, rank=4)
    for shape in MESHES:
        mesh = MeshShape(shape)
        layout = auto(architecture(preset), mesh)
        placements = resolve(layout.rules, weights, mesh)
        assert replicated_fraction(placements, mesh) < 0.005, (shape, layout.fallbacks)
        for fallback in layout.fallbacks:
            assert fallback.used == "head_dim", (shape, fallback)
            assert f"{shape[1]} devices do not divide" in fallback.reason
        if shape[1] > 1:
            kernels = [each for each in placements if each.weight.path.endswith(("/kernel", "gate_proj", "down_proj"))]
            # Every device chooses the experts of its own tokens.
            kernels = [each for each in kernels if "moe_router" not in each.weight.path]
            assert all(each.splits("model") for each in kernels)


@pytest.mark.parametrize("shape", [(1, 3), (1, 6), (1, 7), (1, 12), (2, 7)], ids=str)
def test_a_mesh_that_replicates_the_table_is_refused_with_the_axes_that_split_it(devices: int, shape):
    mesh, named = MeshShape(shape), architecture("gemma3_270m")
    settings = Layout(name="auto", rules=None, shard_over_batch="none", max_replicated_fraction=0.02)
    placements = resolve(auto(named, mesh).rules, declared_weights("gemma3_270m"), mesh)
    with pytest.raises(StageError, match="one that divides this model: ") as raised:
        check_replication(placements, mesh, 0.02, replication_advice(settings, named, placements, mesh))
    told = re.search(r"this model: ([\d, ]+), or raise", str(raised.value))[1]
    for size in map(int, told.split(", ")):
        other = MeshShape((1, size))
        assert size <= mesh.devices
        check_replication(resolve(auto(named, other).rules, declared_weights("gemma3_270m"), other), other, 0.02)


def test_auto_splits_each_kind_of_block_by_its_own_heads():
    """Of Gemma 4 31B eight devices divide 16 key/value heads in blocks with a window, and not the 4 in the others."""
    layout = auto(architecture("gemma4_31b"), MeshShape((1, 8)))
    found = {rule.pattern: rule.spec for rule in layout.rules if rule.pattern.endswith("/kernel")}
    full = "decoder_block_(5|11|17|23|29|35|41|47|53|59)"
    (local,) = {pattern for pattern in found if "(key|value)" in pattern and not pattern.startswith(full)}
    assert found[local] == ("model", None, None)
    assert found[f"{full}/attention/(key|value)/kernel"] == (None, None, "model")
    assert found[r"decoder_block_\d+/attention/query/kernel"] == ("model", None, None)
    assert [each.reason for each in layout.fallbacks] == ["8 devices do not divide 4 key/value heads"]


@pytest.mark.parametrize(("axis", "gate"), [(16, ("model", None, None)), (11, (None, None, "model"))])
def test_auto_splits_the_experts_or_where_they_do_not_divide_each_of_them(axis, gate):
    layout = auto(architecture("gemma4_26b_a4b"), MeshShape((1, axis)))
    found = {rule.pattern: rule.spec for rule in layout.rules if "moe" in rule.pattern}
    down = gate if axis == 16 else (None, "model", None)
    block = r"decoder_block_\d+/moe_expert_bank"
    assert found == {f"{block}/(gate|up)_proj": gate, f"{block}/down_proj": down}
    told = [each.reason for each in layout.fallbacks if "moe" in each.pattern]
    assert told == ([] if axis == 16 else ["11 devices do not divide 128 experts"] * 2)


def test_auto_splits_heads_where_they_divide():
    layout = auto(architecture("gemma_7b_en"), MeshShape((1, 8)))
    assert layout.fallbacks == ()
    query = next(rule for rule in layout.rules if rule.pattern.endswith("query/kernel"))
    assert query.spec == ("model", None, None)


def test_the_tutorials_layout_places_gemma_7b_as_its_code_asks(devices: int):
    mesh = MeshShape((1, 8))
    placements = resolve(tutorial().rules, declared_weights("gemma_7b_en"), mesh)
    specs = {each.weight.path: format_spec(each.spec) for each in placements}
    block = "decoder_block_1/"
    assert specs["token_embedding/embeddings"] == "PartitionSpec('model', None)"
    for layer in ("query", "key", "value", "attention_output"):
        assert specs[f"{block}attention/{layer}/kernel"] == "PartitionSpec('model', None, None)"
    for layer in ("ffw_gating", "ffw_gating_2"):
        assert specs[f"{block}{layer}/kernel"] == "PartitionSpec(None, 'model')"
    assert specs[f"{block}ffw_linear/kernel"] == "PartitionSpec('model', None)"
    assert specs[f"{block}pre_attention_norm/scale"] == "PartitionSpec(None)"


def test_lora_rank_4_on_gemma_7b_has_the_tutorials_parameter_count(devices: int):
    weights = declared_weights("gemma_7b_en", rank=4)
    counts = {"weight": 0, "lora": 0}
    for weight in weights:
        counts[weight.kind] += weight.bytes // 4
    assert counts["lora"] == 11_067_392
    assert counts["weight"] + counts["lora"] == 8_548_748_288


def test_rules_of_ones_own_are_taken_as_written():
    settings = Layout.model_validate(
        {
            "name": "rules",
            "rules": [{"pattern": ".*embeddings", "spec": [["batch", "model"], None]}],
            "shard_over_batch": "none",
            "max_replicated_fraction": 1.0,
        }
    )
    layout = make_layout(settings, architecture("gemma3_270m"), MeshShape((2, 4)))
    assert layout.rules[0].spec == (("batch", "model"), None)
    assert not layout.rules[0].optional


@pytest.fixture
def warned(logged):
    """Return a function that lists what `load` says of a user's own rule, before it knows of an adapter."""

    def check(pattern, *spec, shape=(1, 8), preset="gemma_2b_en"):
        before = len(logged())
        check_adapters([Rule(pattern, spec)], declared_weights(preset), MeshShape(shape))
        return logged()[before:]

    return check


@pytest.mark.parametrize(
    ("pattern", "spec", "told"),
    [
        (".*/lora_kernel_c", ("model", None), "must match those of some layer.*decoder_block_0/attention/query/lora"),
        (".*/attention/query/lora_kernel_a", ("model", None), "one entry for each of the weight's 3 dimensions"),
        (
            ".*/attention/key/lora_kernel_a",
            ("model", None, None),
            "of size 1 must be divisible by the 8 devices.*with any LoRA rank",
        ),
        (".*/attention/query/lora_kernel_b", (None, "data"), "'data' is not a mesh axis"),
    ],
)
def test_a_rule_that_fits_no_adapter_of_any_layer_stops_at_load(devices: int, warned, pattern, spec, told):
    with pytest.raises(StageError, match=told):
        warned(pattern, *spec)


def test_a_rule_that_fits_some_adapter_is_left_to_finetune_which_knows_rank_and_targets(devices: int, warned):
    # Of a feed-forward layer A has two dimensions; the rank may be one that eight devices divide.
    assert warned(".*/lora_kernel_a", "model", None, None) == []
    assert warned(".*/attention/query/lora_kernel_b", "model", None) == []


def test_a_rule_for_kernels_that_catches_an_adapters_too_is_told_at_load(devices: int, warned, logged):
    [line] = warned(".*/attention/key/.*", None, None, "model", shape=(1, 3))
    assert "such as decoder_block_0/attention/key/lora_kernel_a" in line and "End the pattern in /kernel" in line
    assert warned(".*/attention/key/kernel", None, None, "model") == []
    before = logged()
    check_adapters(tutorial().rules, declared_weights("gemma_7b_en"), MeshShape((1, 8)))
    assert logged() == before


def test_the_facts_table_is_the_one_beside_the_project_if_there_is_one():
    facts = ROOT.parent / "shared" / "facts" / "gemma_architectures.yaml"
    if not facts.exists():
        pytest.skip("the table that these figures were taken from is not part of a clone")
    table = YAML(typ="safe").load(facts.read_text())
    # Later families have a file of their own there.
    ours = {name: row["params"] for name, row in GEMMAS.items() if not name.startswith(("gemma4", "vault"))}
    assert {name: row["params"] for name, row in table.items()} == ours
