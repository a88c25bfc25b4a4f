"""Weights or optimizer state split over the batch axis: the same step as without, in less memory on each device."""

from __future__ import annotations

import functools

import pytest

from stages.core.finetune.optimizer import optimizer_placements
from stages.core.load import variants, weight_loading
from stages.core.sharding import table
from tests.support.tiny_models import AUTO, load_tiny
from tests.support.tiny_runs import distance, sampled, settings, train

LAYOUTS = {mode: AUTO.model_copy(update={"shard_over_batch": mode}) for mode in ("none", "optimizer", "weights")}
TARGETS = ["query", "value", "ffw_gating", "attention_output", "ffw_linear"]
# A large epsilon, so that an update is in proportion to its gradient, rounding included.
SMOOTH = {"batch_size": 4, "steps": 2, "epsilon": 0.1, "learning_rate": 0.1, "clip_norm": 1.0}


@pytest.fixture(scope="module")
def trained(presets):
    """Two steps of a family on a mesh, by what is split over its batch axis; each is run once."""

    @functools.cache
    def run(family, mode, shape, dtype="float32", **changes):
        wanted = settings(**{**SMOOTH, "targets": TARGETS, **changes})
        return train(presets[family], wanted, shape=shape, dtype=dtype, layout=LAYOUTS[mode])

    return run


def assert_same_run(found, wanted, tolerance=1e-5):
    """Losses, validation and trained weights are the same but for rounding."""
    (result, weights), (wanted_result, wanted_weights) = found, wanted
    for row, other in zip(result.history.rows, wanted_result.history.rows, strict=True):
        assert row.loss == pytest.approx(other.loss, rel=tolerance)
    last, other = result.history.rows[-1], wanted_result.history.rows[-1]
    assert last.validation_loss == pytest.approx(other.validation_loss, rel=tolerance)
    assert distance(weights, wanted_weights) < tolerance


@pytest.mark.parametrize("mode", ["optimizer", "weights"])
def test_what_is_split_over_the_batch_axis_trains_as_what_is_whole(trained, mode):
    assert_same_run(trained("gemma3", mode, (2, 4), rank=0), trained("gemma3", "none", (2, 4), rank=0))


@pytest.mark.parametrize(
    "changes",
    [{"rank": 0, "rematerialize": True, "gradient_accumulation": 2, "batch_size": 2}, {"rank": 2, "lora_dropout": 0.5}],
    ids=["recomputed and accumulated", "dropped out"],
)
def test_so_it_does_with_the_options_of_a_step(trained, changes):
    assert_same_run(trained("gemma3", "weights", (2, 4), **changes), trained("gemma3", "none", (2, 4), **changes))


def test_weights_sent_in_bfloat16_give_the_very_loss_of_whole_ones(trained):
    """What is sent is rounded as what is multiplied, and gradients are summed in float32."""
    found, wanted = (
        trained("gemma", mode, (2, 4), dtype="mixed_bfloat16", rank=0, steps=1) for mode in ("weights", "none")
    )
    assert found[0].history.rows[0].loss == pytest.approx(wanted[0].history.rows[0].loss, rel=1e-6)
    assert distance(found[1], wanted[1]) < 1e-4


@pytest.mark.parametrize(("mode", "rest"), [("optimizer", 1 / 3 + 2 / 3 / 2), ("weights", 1 / 2)])
def test_each_device_holds_its_part_and_the_report_says_so(presets, trained, mode, rest):
    result, _ = trained("gemma3", mode, (2, 4), rank=0)
    whole, _ = trained("gemma3", "none", (2, 4), rank=0)
    # Norm scales, of which each device has all, are a twentieth of so small a model.
    assert result.state_bytes == pytest.approx(rest * whole.state_bytes, rel=0.06)
    model = load_tiny(presets["gemma3"], (2, 4), rank=0, layout=LAYOUTS[mode])
    variants.check_placed(model)
    report = table.report(
        [*model.placements, *optimizer_placements(model, result.optimizer)],
        model.mesh_shape,
        preset="gemma3",
        layout=model.layout,
        dtype="float32",
        trainable_parameters=result.trainable_parameters,
    )
    # Of the step's state the report leaves out counters.
    assert report.bytes_per_device == pytest.approx(result.state_bytes, rel=1e-3)
    assert report.shard_over_batch == mode
    kernel = next(row for row in report.weights if row.pattern.endswith("query/kernel/momentum"))
    assert kernel.spec == ["model", "batch", None]


def test_a_split_model_writes_the_text_of_a_whole_one(presets):
    prompts = [[2, 5, 9], [2, 7]]
    texts = [
        sampled(load_tiny(presets["gemma3"], (2, 4), rank=2, layout=LAYOUTS[mode]), prompts)
        for mode in ("none", "weights")
    ]
    assert texts[0] == texts[1]


def test_the_loader_reads_of_each_weight_the_parts_of_its_devices(presets, monkeypatch):
    reads = []
    real = weight_loading.ArraySource.read

    def read(self, path, index):
        reads.append((path, real(self, path, index).shape))
        return real(self, path, index)

    monkeypatch.setattr(weight_loading.ArraySource, "read", read)
    load_tiny(presets["gemma3"], (2, 4), rank=2, layout=LAYOUTS["weights"])
    kernel_a = [shape for path, shape in reads if path.endswith("decoder_block_0/attention/query/lora_kernel_a")]
    assert kernel_a == [(1, 32, 2)] * 8
