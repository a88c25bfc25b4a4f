"""What a run does: every step that was asked for, numbers that stay finite, dtypes, memory."""

from __future__ import annotations

import jax
import keras
import numpy as np
import pytest

from stages.core.common.errors import StageError
from stages.core.finetune import resuming, trainer
from stages.core.finetune.checkpoint import Store
from stages.core.generate import sampling
from stages.core.model.causal_lm import make_model
from stages.core.presets.formats import format_of
from stages.core.tokenize.batches import Batches
from tests.support.tiny_models import describe, load_tiny, open_tiny, sequences
from tests.support.tiny_runs import data, distance, settings, train


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_a_run_that_changes_no_bit_fails(one_block, rank, monkeypatch):
    monkeypatch.setattr(keras.optimizers.AdamW, "update_step", lambda *arguments: None)
    with pytest.raises(StageError, match=r"changed no bit.*Received: steps=1, learning_rate=0\.01.*Set a higher"):
        train(one_block, settings(batch_size=2, steps=1, rank=rank, weight_decay=0.0))
    if rank:
        # The decay alone moves A, and an adapter without B does nothing still.
        with pytest.raises(StageError, match="changed no bit"):
            load = settings(batch_size=2, steps=1, rank=rank, weight_decay=0.5)
            finetuning_of_a_new_adapter(one_block, load)


def finetuning_of_a_new_adapter(preset, wanted):
    model = load_tiny(preset, (1, 1), rank=wanted.rank, random_b=False)
    return trainer.fit(model, data(), wanted)


def test_every_weight_in_bfloat16_is_refused_where_a_baseline_of_it_is_met(one_block):
    preset = open_tiny(one_block)
    with pytest.raises(StageError, match=r"must be mixed_bfloat16 .*finetune\.rank=0"):
        trainer.load_trainable(preset, describe(preset, (1, 1), dtype="bfloat16"), settings(rank=0))


def test_every_weight_learns_in_mixed_bfloat16(one_block):
    result, weights = train(one_block, settings(batch_size=4, epochs=4, rank=0), dtype="mixed_bfloat16")
    losses = [row.loss for row in result.history.rows]
    assert losses[-1] < losses[0] - 0.05
    assert {array.dtype.name for array in weights.values()} == {"float32"}


def test_a_pass_that_keras_cuts_short_is_finished_in_training_and_fails_in_measuring(one_block, plain, monkeypatch):
    """As KERAS_MAX_STEPS_PER_EPOCH cuts it."""
    monkeypatch.setattr(Batches, "__len__", lambda self: 1)
    result, weights = train(one_block, settings(batch_size=2))
    assert result.history.steps == 4
    assert distance(weights, plain[1]) == 0.0
    model = load_tiny(one_block, (1, 1), rank=2)
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    causal.compile(optimizer=None, loss=None)
    with pytest.raises(StageError, match=r"expected 232 tokens\. Received: tokens=58"):
        batches = Batches(data()["train"], 2, model.mesh_shape)
        causal.measure(batches, batches.tokens)


def test_a_step_that_trains_fewer_tokens_than_its_sequences_have_fails(one_block, monkeypatch):
    monkeypatch.setattr(Batches, "tokens_of", lambda self, epoch, step: 59)
    with pytest.raises(StageError, match=r"must train all 59 tokens of its sequences\. Received: tokens=58"):
        train(one_block, settings(batch_size=2))


def test_recomputing_blocks_keeps_less_for_the_backward_pass_and_gives_the_same_weights(presets, one_block, plain):
    def kept_bytes(rematerialize):
        """What the forward pass hands to the backward pass, weights left out, on any backend."""
        model = load_tiny(presets["gemma3"], (1, 1), rank=2)
        causal = trainer.make_causal(model, settings(rematerialize=rematerialize))
        causal.compile(optimizer=None, loss=None)
        rest = [each.value for each in causal.non_trainable_variables]
        metrics = [each.value for each in causal.metrics_variables]
        batch = sequences(4, 64)

        def loss(trainable):
            return causal.compute_loss_and_updates(trainable, rest, metrics, batch, None, None, training=True)[0]

        pulled = jax.eval_shape(lambda values: jax.vjp(loss, values)[1], [v.value for v in causal.trainable_variables])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pulled))

    weights = sum(each.value.nbytes for each in load_tiny(presets["gemma3"], (1, 1), rank=2).backbone.weights)
    assert kept_bytes(True) - weights < 0.5 * (kept_bytes(False) - weights)
    assert distance(train(one_block, settings(batch_size=2, rematerialize=True))[1], plain[1]) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_the_adapter_learns_in_float32_whatever_the_models_dtype(one_block, dtype):
    result, weights = train(one_block, settings(batch_size=4, epochs=6), dtype=dtype, shape=(1, 2))
    losses = [row.loss for row in result.history.rows]
    assert losses[-1] < losses[0] - 0.05
    assert {array.dtype.name for array in weights.values()} == {"float32"}
    slots = [variable for variable in result.optimizer.variables if "lora" in variable.path]
    assert len(slots) == 2 * len(weights)
    assert {variable.value.dtype.name for variable in slots} == {"float32"}


def test_a_loss_that_is_not_finite_names_step_rate_and_reviews(one_block):
    given = data()
    given["train"]["weights"][5] = np.nan
    with pytest.raises(StageError) as raised:
        train(one_block, settings(batch_size=2, schedule="linear"), given)
    # The order of the first epoch, and so the step that has sequence 5, follow from the seed.
    order = np.random.default_rng([0, 0]).permutation(8)
    step = int(np.flatnonzero(order == 5)[0]) // 2
    reviews = sorted((10 + order[2 * step : 2 * step + 2]).tolist())
    assert f"step={step + 1}, learning_rate={0.01 * (1 - step / 4):.6g}, reviews={reviews}" in str(raised.value)


def test_weights_that_are_not_finite_are_never_kept(one_block, tmp_path, monkeypatch, logged):
    """A gradient may overflow where the loss does not; the step's own loss then tells nothing of it."""
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path))
    store = Store("overflow", keep=2)
    given = data()
    # Huge weights: the loss is a mean over them and stays what it was, and so does its gradient; their square does not.
    wanted = settings(batch_size=2, checkpoint_every=1, learning_rate=1.0)
    huge = given["train"]["weights"]
    huge[:] = huge * 3e38
    with pytest.raises(StageError, match="Training diverged"):
        train(one_block, wanted, given, store=store)
    before = logged()
    assert resuming.newest(store) is None
    assert logged() == before


def test_a_sample_that_fails_is_told_in_one_line_and_the_run_goes_on(presets, monkeypatch, logged):
    def fail(*_: object) -> None:
        raise IndexError("a row\nwithout a piece")

    monkeypatch.setattr(sampling.Sampler, "__call__", fail)
    wanted = settings(batch_size=2, steps=4, sample_every=2, sample_prompt="This movie was", sample_tokens=5)
    tokenizer = format_of("keras").load_tokenizer(presets["gemma"])
    result, _ = train(presets["gemma"], wanted, tokenizer=tokenizer)
    assert [row.step for row in result.history.rows][-1] == 4
    assert [each.text for each in result.history.samples] == ["", ""]
    assert [line for line in logged() if "sample" in line] == [
        f"No sample after step {step}: IndexError: a row without a piece" for step in (2, 4)
    ]
