"""LoRA's targets and its dropout."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from stages.core.common.errors import StageError
from stages.core.config.schema import Layout
from stages.core.finetune import trainer
from stages.core.load import lora_kernels
from stages.core.load.backbone import build_backbone
from stages.core.model.causal_lm import make_model
from stages.core.records.layout import LoraConfig
from tests.support.tiny_models import describe, load_tiny, open_tiny
from tests.support.tiny_runs import distance, settings, train

BLOCK = ("attention/query", "attention/key", "attention/value", "attention/attention_output")
TARGETS = {
    ("query",): [f"decoder_block_{block}/attention/query" for block in (0, 1)],
    ("ffw_gating",): [f"decoder_block_{block}/ffw_gating" for block in (0, 1)],
    ("attention/.*",): [f"decoder_block_{block}/{layer}" for block in (0, 1) for layer in BLOCK],
    ("decoder_block_1/.*gating.*", "key"): [
        "decoder_block_1/ffw_gating",
        "decoder_block_1/ffw_gating_2",
        "decoder_block_0/attention/key",
        "decoder_block_1/attention/key",
    ],
}


def declared(preset, targets):
    backbone = build_backbone(open_tiny(preset).architecture, "float32")
    lora_kernels.declare(backbone, LoraConfig(2, None, tuple(targets)))
    return backbone


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_targets_are_names_or_patterns_over_layer_paths(presets, targets):
    backbone = declared(presets["gemma3"], targets)
    adapted = {variable.path.rpartition("/lora_kernel")[0] for variable in backbone.trainable_variables}
    assert adapted == set(TARGETS[targets])


def test_a_target_that_matches_nothing_is_told_with_the_layers_there_are(presets):
    with pytest.raises(StageError, match=r"targets='quary'.*attention/query.*decoder_block_0 to decoder_block_1"):
        declared(presets["gemma"], ["value", "quary"])
    # The embedding could have an adapter in Keras; the head here does not apply one.
    with pytest.raises(StageError, match="matches none"):
        declared(presets["gemma"], ["token_embedding"])


def test_rules_that_do_not_divide_an_adapter_stop_finetune_before_anything_is_allocated(presets, monkeypatch):
    rule = {"pattern": ".*/query/lora_kernel_b", "spec": ["model", None]}
    layout = Layout.model_validate(
        {"name": "rules", "rules": [rule], "shard_over_batch": "none", "max_replicated_fraction": 1.0}
    )
    preset = open_tiny(presets["gemma3"])
    monkeypatch.setattr(trainer, "fill_model", pytest.fail)
    with pytest.raises(
        StageError,
        match=r"size 2 must be divisible by the 4 .*query/lora_kernel_b, shape=\(2, 16\)",
    ):
        trainer.load_trainable(preset, describe(preset, (1, 4), layout), settings(rank=2))


def test_dropout_changes_training_and_not_what_is_measured(one_block, plain):
    result, weights = train(one_block, settings(batch_size=2, lora_dropout=0.5, validate_every=1))
    again = train(one_block, settings(batch_size=2, lora_dropout=0.5))[1]
    assert result.history.rows[0].loss != plain[0].history.rows[0].loss
    assert distance(weights, plain[1]) > 0.0
    assert distance(weights, again) == 0.0
    # Nearly no step at all: what is measured then is the model without dropout.
    small = {"batch_size": 2, "learning_rate": 1e-9, "validate_every": 1}
    without = train(one_block, settings(**small))[0].history.rows[0].validation_loss
    with_it = train(one_block, settings(**small, lora_dropout=0.5))[0].history.rows[0].validation_loss
    assert with_it == pytest.approx(without, rel=1e-6)


def test_what_is_dropped_differs_by_layer_step_and_seed_and_is_the_named_share(presets):
    model = load_tiny(presets["gemma3"], (1, 1), rank=2)
    ones = jnp.ones((64, 64))
    masks = {}
    for seed in (0, 1):
        causal = make_model(model.backbone, model.jax_mesh, model.placements, dropout=0.25, seed=seed)
        for step in (0, 1):
            drop = causal._drop()
            for path in ("decoder_block_0/attention/query", "decoder_block_0/attention/value"):
                masks[seed, step, path] = np.asarray(drop(ones, path))
    for key, mask in masks.items():
        assert set(np.unique(mask)) == {0.0, np.float32(1 / 0.75)}
        assert (mask == 0.0).mean() == pytest.approx(0.25, abs=0.03)
        assert all(np.any(mask != other) for name, other in masks.items() if name != key)


def test_dropout_is_the_same_on_every_mesh(one_block):
    wanted = settings(batch_size=2, steps=2, lora_dropout=0.5)
    one = train(one_block, wanted)[0].history.rows
    many = train(one_block, wanted, shape=(2, 4))[0].history.rows
    assert [row.loss for row in many] == pytest.approx([row.loss for row in one], rel=1e-4)
