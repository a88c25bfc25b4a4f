"""Each training option does what its comment in params.yaml says, on tiny models."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from stages.core.common.errors import ParamsError, StageError
from tests.support.tiny_models import load_tiny, open_tiny, windows
from tests.support.tiny_runs import data, distance, settings, train


@pytest.fixture(scope="module")
def plain(presets):
    """Four steps with the default options."""
    return train(presets["gemma3"], settings(batch_size=2))


def test_the_same_settings_give_the_same_weights_and_another_seed_others(presets, plain):
    assert distance(train(presets["gemma3"], settings(batch_size=2))[1], plain[1]) == 0.0
    assert distance(train(presets["gemma3"], settings(batch_size=2, seed=1))[1], plain[1]) > 0.0


# --- LoRA ---

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
    from stages.core.load import lora_kernels
    from stages.core.load.backbone import build_backbone

    backbone = build_backbone(open_tiny(preset).architecture, "float32")
    lora_kernels.declare(backbone, 2, None, targets)
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
    from stages.core.config.schema import Layout
    from stages.core.finetune import trainer
    from tests.support.tiny_models import describe

    rule = {"pattern": ".*/query/lora_kernel_b", "spec": ["model", None]}
    layout = Layout.model_validate({"name": "rules", "rules": [rule], "max_replicated_fraction": 1.0})
    preset = open_tiny(presets["gemma3"])
    monkeypatch.setattr(trainer, "fill_model", pytest.fail)
    with pytest.raises(StageError, match=r"2 by 4 leaves 2\. .*query/lora_kernel_b, shape=\(2, 16\)"):
        trainer.load_trainable(preset, describe(preset, (1, 4), layout), settings(rank=2))


def test_dropout_changes_training_and_not_what_is_measured(presets, plain):
    result, weights = train(presets["gemma3"], settings(batch_size=2, lora_dropout=0.5, validate_every=1))
    again = train(presets["gemma3"], settings(batch_size=2, lora_dropout=0.5))[1]
    assert result.history.rows[0].loss != plain[0].history.rows[0].loss
    assert distance(weights, plain[1]) > 0.0
    assert distance(weights, again) == 0.0
    # Nearly no step at all: what is measured then is the model without dropout.
    small = {"batch_size": 2, "learning_rate": 1e-9, "validate_every": 1}
    without = train(presets["gemma3"], settings(**small))[0].history.rows[0].validation_loss
    with_it = train(presets["gemma3"], settings(**small, lora_dropout=0.5))[0].history.rows[0].validation_loss
    assert with_it == pytest.approx(without, rel=1e-6)


def test_what_is_dropped_differs_by_layer_step_and_seed_and_is_the_named_share(presets):
    import jax.numpy as jnp

    from stages.core.model.causal_lm import make_model

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


def test_dropout_is_the_same_on_every_mesh(presets):
    wanted = settings(batch_size=2, steps=2, lora_dropout=0.5)
    one = train(presets["gemma3"], wanted)[0].history.rows
    many = train(presets["gemma3"], wanted, shape=(2, 4))[0].history.rows
    assert [row.loss for row in many] == pytest.approx([row.loss for row in one], rel=1e-4)


# --- The optimizer ---


def wanted_rate(shape, step, steps, warmup):
    """The formula of the schedule, written out again."""
    if step < warmup:
        return 0.01 * (step + 1) / warmup
    part = (step - warmup) / (steps - warmup)
    return 0.01 * {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[shape]


@pytest.mark.parametrize(("shape", "warmup"), [("constant", 3), ("linear", 0), ("linear", 2), ("cosine", 2)])
def test_the_learning_rate_follows_its_schedule(presets, shape, warmup):
    wanted = settings(batch_size=1, schedule=shape, warmup_steps=warmup)
    rates = [row.learning_rate for row in train(presets["gemma3"], wanted)[0].history.rows]
    assert len(rates) == 8
    assert rates == pytest.approx([wanted_rate(shape, step, 8, warmup) for step in range(8)], rel=1e-5)


def test_a_schedule_reaches_the_optimizer(presets):
    """One step with a warm-up of 1000 moves the weights a thousandth of what one without moves them."""
    start = train(presets["gemma3"], settings(batch_size=2, steps=1, learning_rate=1e-9))[1]
    full = train(presets["gemma3"], settings(batch_size=2, steps=1))[1]
    slow = train(presets["gemma3"], settings(batch_size=2, steps=1, warmup_steps=1000))[1]
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
def test_accumulated_batches_are_one_batch_of_all_their_sequences(presets, given, rank, shape):
    """Seven sequences: the last step of an epoch has three of its four batches."""
    wanted = {"epochs": 2, "rank": rank, "epsilon": 1e-3, "validate_every": 1}
    large, of_large = train(presets["gemma3"], settings(batch_size=4, **wanted), given(), shape=shape)
    small, of_small = train(
        presets["gemma3"], settings(batch_size=1, gradient_accumulation=4, **wanted), given(), shape=shape
    )
    assert large.history.steps == small.history.steps == 4
    for one, other in zip(large.history.rows, small.history.rows, strict=True):
        assert one["tokens"] == other["tokens"]
        for key in ("loss", "accuracy", "validation_loss"):
            assert one[key] == pytest.approx(other[key], rel=2e-5), key
    assert distance(of_small, of_large) < 1e-4
    assert small.metrics().loss_last == pytest.approx(large.metrics().loss_last, abs=1e-4)


@pytest.mark.parametrize("wanted", [{"lora_dropout": 0.5}, {"clip_norm": 1e-3}], ids=str)
def test_a_group_drops_and_clips_as_a_whole(presets, wanted):
    """Each batch of a group drops by a mask of its own; the norm is that of the group's gradient."""
    changes = {"epsilon": 1e-3, "steps": 1, "learning_rate": 0.1, **wanted}
    large = train(presets["gemma3"], settings(batch_size=4, **changes), unequal())[1]
    small = train(presets["gemma3"], settings(batch_size=1, gradient_accumulation=4, **changes), unequal())[1]
    assert (distance(small, large) < 1e-5) == ("clip_norm" in wanted)


def test_steps_schedule_warm_up_validation_and_samples_count_updates(presets):
    wanted = settings(
        batch_size=1, gradient_accumulation=3, epochs=2, schedule="linear", warmup_steps=2, validate_every=2
    )
    rows = train(presets["gemma3"], wanted)[0].history.rows
    assert [row.epoch for row in rows] == [1, 1, 1, 2, 2, 2]
    assert [row.learning_rate for row in rows] == pytest.approx(
        [wanted_rate("linear", step, 6, 2) for step in range(6)], rel=1e-5
    )
    assert [row.step for row in rows if row.validation_loss is not None] == [2, 4, 6]
    assert train(presets["gemma3"], wanted.model_copy(update={"steps": 4}))[0].history.steps == 4


def test_more_batches_than_an_epoch_has_are_not_accumulated(presets):
    with pytest.raises(ParamsError, match=r"at most the batches of an epoch, 4\. Received: .*=5"):
        train(presets["gemma3"], settings(batch_size=2, gradient_accumulation=5, epochs=3))


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
def test_a_setting_that_does_nothing_in_a_run_of_this_length_is_told_in_one_line(changes, told):
    from stages.core.finetune.trainer import check_length

    wanted = settings(**changes)
    per_epoch = math.ceil(4 / wanted.gradient_accumulation)
    said = []
    total = min(wanted.epochs * per_epoch, wanted.steps or 10**9)
    check_length(wanted, batches=4, steps=total, say=said.append)
    assert len(said) == len(told)
    for line, name in zip(said, told, strict=True):
        assert f"Warning: finetune.{name} does nothing" in line and "\n" not in line


@pytest.mark.parametrize("changes", [{"beta_1": 0.5}, {"beta_2": 0.9}, {"epsilon": 1e-2}], ids=str)
def test_adams_own_settings_reach_the_weights(presets, plain, changes):
    assert distance(train(presets["gemma3"], settings(batch_size=2, **changes))[1], plain[1]) > 1e-4


def test_an_update_is_keras_formula_with_epsilon_outside_of_the_bias_correction(devices):
    import keras

    from stages.core.finetune.optimizer import make_optimizer

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


# --- What was done is what was asked ---


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_a_run_that_changes_no_bit_fails(presets, rank, monkeypatch):
    import keras

    monkeypatch.setattr(keras.optimizers.AdamW, "update_step", lambda *arguments: None)
    with pytest.raises(StageError, match=r"changed no bit.*Received: steps=1, learning_rate=0\.01.*Set a higher"):
        train(presets["gemma3"], settings(batch_size=2, steps=1, rank=rank, weight_decay=0.0))
    if rank:
        # The decay alone moves A, and an adapter without B does nothing still.
        with pytest.raises(StageError, match="changed no bit"):
            load = settings(batch_size=2, steps=1, rank=rank, weight_decay=0.5)
            finetuning_of_a_new_adapter(presets["gemma3"], load)


def finetuning_of_a_new_adapter(preset, wanted):
    from stages.core.finetune import trainer

    model = load_tiny(preset, (1, 1), rank=wanted.rank, random_b=False)
    return trainer.fit(model, data(), wanted)


def test_every_weight_in_bfloat16_is_refused_where_a_baseline_of_it_is_met(presets):
    from stages.core.finetune import trainer
    from tests.support.tiny_models import describe

    preset = open_tiny(presets["gemma3"])
    with pytest.raises(StageError, match=r"must be mixed_bfloat16 .*finetune\.rank=0"):
        trainer.load_trainable(preset, describe(preset, (1, 1), dtype="bfloat16"), settings(rank=0))


def test_every_weight_learns_in_mixed_bfloat16(presets):
    result, weights = train(presets["gemma3"], settings(batch_size=4, epochs=4, rank=0), dtype="mixed_bfloat16")
    losses = [row.loss for row in result.history.rows]
    assert losses[-1] < losses[0] - 0.05
    assert {array.dtype.name for array in weights.values()} == {"float32"}


def test_a_pass_that_keras_cuts_short_is_finished_in_training_and_fails_in_measuring(presets, plain, monkeypatch):
    """As KERAS_MAX_STEPS_PER_EPOCH cuts it."""
    from stages.core.model.causal_lm import make_model
    from stages.core.tokenize.batches import Batches

    monkeypatch.setattr(Batches, "__len__", lambda self: 1)
    result, weights = train(presets["gemma3"], settings(batch_size=2))
    assert result.history.steps == 4
    assert distance(weights, plain[1]) == 0.0
    model = load_tiny(presets["gemma3"], (1, 1), rank=2)
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    causal.compile(optimizer=None, loss=None)
    with pytest.raises(StageError, match=r"expected 232 tokens\. Received: tokens=58"):
        batches = Batches(data()["train"], 2, model.mesh_shape)
        causal.measure(batches, batches.tokens)


def test_a_step_that_trains_fewer_tokens_than_its_sequences_have_fails(presets, monkeypatch):
    from stages.core.tokenize.batches import Batches

    monkeypatch.setattr(Batches, "tokens_of", lambda self, epoch, step: 59)
    with pytest.raises(StageError, match=r"must train all 59 tokens of its sequences\. Received: tokens=58"):
        train(presets["gemma3"], settings(batch_size=2))


def test_gradients_beyond_the_norm_are_scaled_down(presets, plain):
    # Far below Adam's epsilon of 1e-7 a gradient moves nothing.
    start = train(presets["gemma3"], settings(batch_size=2, learning_rate=1e-9))[1]
    clipped = train(presets["gemma3"], settings(batch_size=2, clip_norm=1e-12))[1]
    assert distance(clipped, start) < 1e-3
    assert distance(plain[1], start) > 1e-2


# --- Memory and numbers ---


def test_recomputing_blocks_keeps_less_for_the_backward_pass_and_gives_the_same_weights(presets, plain):
    import jax

    from stages.core.finetune import trainer

    def kept_bytes(rematerialize):
        """What the forward pass hands to the backward pass, weights left out, on any backend."""
        model = load_tiny(presets["gemma3"], (1, 1), rank=2)
        causal = trainer.make_causal(model, settings(rematerialize=rematerialize))
        causal.compile(optimizer=None, loss=None)
        rest = [each.value for each in causal.non_trainable_variables]
        metrics = [each.value for each in causal.metrics_variables]
        batch = windows(4, 64)

        def loss(trainable):
            return causal.compute_loss_and_updates(trainable, rest, metrics, batch, None, None, training=True)[0]

        pulled = jax.eval_shape(lambda values: jax.vjp(loss, values)[1], [v.value for v in causal.trainable_variables])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pulled))

    weights = sum(each.value.nbytes for each in load_tiny(presets["gemma3"], (1, 1), rank=2).backbone.weights)
    assert kept_bytes(True) - weights < 0.5 * (kept_bytes(False) - weights)
    assert distance(train(presets["gemma3"], settings(batch_size=2, rematerialize=True))[1], plain[1]) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_the_adapter_learns_in_float32_whatever_the_models_dtype(presets, dtype):
    result, weights = train(presets["gemma3"], settings(batch_size=4, epochs=6), dtype=dtype, shape=(1, 2))
    losses = [row.loss for row in result.history.rows]
    assert losses[-1] < losses[0] - 0.05
    assert {array.dtype.name for array in weights.values()} == {"float32"}
    slots = [variable for variable in result.optimizer.variables if "lora" in variable.path]
    assert len(slots) == 2 * len(weights)
    assert {variable.value.dtype.name for variable in slots} == {"float32"}


# --- Steps, validation, early stopping, samples ---


def test_each_epoch_takes_every_window_once_in_an_order_of_its_own(presets):
    # With hardly any learning a window has the same loss in each epoch, and so is known by it.
    wanted = settings(batch_size=1, epochs=3, learning_rate=1e-9)
    rows = train(presets["gemma3"], wanted)[0].history.rows
    assert [row.epoch for row in rows] == [1] * 8 + [2] * 8 + [3] * 8
    orders = [[round(row.loss, 4) for row in rows[start : start + 8]] for start in (0, 8, 16)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize(("steps", "done"), [(None, 8), (3, 3), (6, 6), (100, 8)])
def test_a_run_ends_with_its_steps_or_its_epochs(presets, steps, done):
    assert train(presets["gemma3"], settings(batch_size=2, epochs=2, steps=steps))[0].history.steps == done


@pytest.mark.parametrize("steps, shown", [(3, ["3/3"]), (6, ["4/4", "2/2"]), (None, ["4/4", "4/4"])])
def test_the_progress_counts_the_steps_that_the_run_does(presets, capsys, steps, shown):
    train(presets["gemma3"], settings(steps=steps, epochs=2, batch_size=2))
    assert re.findall(r"^(\d+/\d+) - ", capsys.readouterr().out, re.MULTILINE) == shown


def test_a_profile_that_cannot_be_written_never_ends_the_run(presets, tmp_path):
    (tmp_path / "file").write_text("in the place of a folder")
    said: list[str] = []
    result, _ = train(presets["gemma3"], settings(steps=3), profile=tmp_path / "file" / "profile", say=said.append)
    assert result.history.steps == 3
    assert said[-1].startswith("Warning: the JAX profile is not written (")


def test_validation_comes_when_it_is_wanted_and_changes_nothing(presets, plain):
    def measured(**changes):
        result, weights = train(presets["gemma3"], settings(batch_size=2, **changes))
        assert distance(weights, plain[1]) == 0.0
        return [row.step for row in result.history.rows if row.validation_loss is not None]

    assert measured() == [4]
    assert measured(validate_every=1) == [1, 2, 3, 4]
    assert measured(validate_every=3) == [3, 4]


def test_early_stopping_gives_the_weights_of_the_lowest_held_out_loss(presets):
    from stages.core.tokenize.batches import Batches

    # Random targets: what is learnt of some windows is wrong for others.
    given = data()
    wanted = settings(batch_size=4, epochs=40, learning_rate=0.05, validate_every=2, early_stopping=3)
    model = load_tiny(presets["gemma3"], (1, 1), rank=2)
    from stages.core.finetune import trainer

    said = []
    history = trainer.fit(model, given, wanted, say=said.append).history
    held_out = [row.validation_loss for row in history.rows if row.validation_loss is not None]
    assert history.steps < 80
    assert min(held_out) < min(held_out[-3:])
    assert held_out.index(min(held_out)) == len(held_out) - 4
    assert f"Stopped after step {history.steps}" in said[0]
    causal = trainer.make_causal(model, wanted)
    causal.compile(optimizer=None, loss=None)
    loss = causal.evaluate(Batches(given["validation"], 4, model.mesh_shape), return_dict=True, verbose=0)["loss"]
    assert loss == pytest.approx(min(held_out), rel=1e-6)


def test_samples_are_taken_on_the_way_and_change_nothing(presets, plain):
    from stages.core.presets.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(presets["gemma3"], "keras")
    wanted = settings(batch_size=2, sample_every=2, sample_prompt="This movie was", sample_tokens=5)
    result, weights = train(presets["gemma3"], wanted, tokenizer=tokenizer)
    assert distance(weights, plain[1]) == 0.0
    assert [sample.step for sample in result.history.samples] == [2, 4]
    assert {sample.prompt for sample in result.history.samples} == {"This movie was"}
    assert all(len(tokenizer.encode(sample.text)) <= 5 for sample in result.history.samples)


def test_sampling_again_compiles_nothing_and_sees_the_new_weights(presets):
    from stages.core.generate.sampling import Sampler, SamplerSettings
    from stages.core.model.causal_lm import make_model

    model = load_tiny(presets["gemma3"], (1, 2), rank=2)
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    sampler = Sampler(causal, SamplerSettings(8, 0.0, None, stop_ids=(1,)))
    first = sampler([[2, 100, 101]], 0)
    assert sampler([[2, 100, 101]], 0) == first
    kernel = next(variable for variable in model.backbone.weights if variable.path.endswith("ffw_linear/kernel"))
    kernel.assign(-kernel.value)
    assert sampler([[2, 100, 101]], 0) != first
    assert sampler._run._cache_size() == 1


def test_a_step_is_compiled_once_however_often_the_run_is_looked_at(presets, caplog):
    import jax

    with jax.log_compiles(), caplog.at_level("WARNING"):
        train(presets["gemma3"], settings(batch_size=2, epochs=3, validate_every=3))
    compiled = [
        record.getMessage() for record in caplog.records if "Finished XLA compilation of" in record.getMessage()
    ]
    assert sum("jit(train_step)" in message for message in compiled) == 1
    assert sum("jit(test_step)" in message for message in compiled) == 1


# --- Divergence ---


def test_a_loss_that_is_not_finite_names_step_rate_and_reviews(presets):
    given = data()
    given["train"]["weights"][5] = np.nan
    with pytest.raises(StageError) as raised:
        train(presets["gemma3"], settings(batch_size=2, schedule="linear"), given)
    # The order of the first epoch, and so the step that has window 5, follow from the seed.
    order = np.random.default_rng([0, 0]).permutation(8)
    step = int(np.flatnonzero(order == 5)[0]) // 2
    reviews = sorted((10 + order[2 * step : 2 * step + 2]).tolist())
    assert f"step={step + 1}, learning_rate={0.01 * (1 - step / 4):.6g}, reviews={reviews}" in str(raised.value)


def test_weights_that_are_not_finite_are_never_kept(presets, tmp_path, monkeypatch):
    """A gradient may overflow where the loss does not; the step's own loss then tells nothing of it."""
    from stages.core.finetune.checkpoint import Store

    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path))
    store = Store("overflow", keep=2)
    given = data()
    # Huge weights: the loss is a mean over them and stays what it was, and so does its gradient; their square does not.
    wanted = settings(batch_size=2, checkpoint_every=1, learning_rate=1.0)
    huge = given["train"]["weights"]
    huge[:] = huge * 3e38
    with pytest.raises(StageError, match="Training diverged"):
        train(presets["gemma3"], wanted, given, store=store)
    assert store.newest(pytest.fail) is None


def test_a_sample_that_fails_is_told_in_one_line_and_the_run_goes_on(presets, monkeypatch):
    from stages.core.generate import sampling
    from stages.core.presets.tokenizer import load_tokenizer

    def fail(*_: object) -> None:
        raise IndexError("a row\nwithout a piece")

    monkeypatch.setattr(sampling.Sampler, "__call__", fail)
    said: list[str] = []
    wanted = settings(batch_size=2, steps=4, sample_every=2, sample_prompt="This movie was", sample_tokens=5)
    tokenizer = load_tokenizer(presets["gemma"], "keras")
    result, _ = train(presets["gemma"], wanted, tokenizer=tokenizer, say=said.append)
    assert [row.step for row in result.history.rows][-1] == 4
    assert [each.text for each in result.history.samples] == ["", ""]
    assert [line for line in said if "sample" in line] == [
        f"No sample after step {step}: IndexError: a row without a piece" for step in (2, 4)
    ]
