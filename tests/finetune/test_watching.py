"""Around the steps: epochs, validation, early stopping, samples, progress."""

from __future__ import annotations

import re

import jax
import pytest

from stages.core.finetune import callback, trainer
from stages.core.generate.sampling import Sampler, SamplerSettings
from stages.core.model.causal_lm import make_model
from stages.core.presets.formats import format_of
from stages.core.tokenize.batches import Batches
from tests.support.tiny_models import load_tiny
from tests.support.tiny_runs import data, distance, settings, train


def test_each_epoch_takes_every_window_once_in_an_order_of_its_own(one_block):
    # With hardly any learning a sequence has the same loss in each epoch, and so is known by it.
    wanted = settings(batch_size=1, epochs=3, learning_rate=1e-9)
    rows = train(one_block, wanted)[0].history.rows
    assert [row.epoch for row in rows] == [1] * 8 + [2] * 8 + [3] * 8
    orders = [[round(row.loss, 4) for row in rows[start : start + 8]] for start in (0, 8, 16)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize(
    ("steps", "done", "shown"),
    [(None, 8, ["4/4", "4/4"]), (3, 3, ["3/3"]), (6, 6, ["4/4", "2/2"]), (100, 8, ["4/4", "4/4"])],
)
def test_a_run_ends_with_its_steps_or_its_epochs_and_its_progress_counts_them(one_block, capsys, steps, done, shown):
    assert train(one_block, settings(batch_size=2, epochs=2, steps=steps))[0].history.steps == done
    assert re.findall(r"^(\d+/\d+) - ", capsys.readouterr().out, re.MULTILINE) == shown


def test_a_profile_that_cannot_be_written_never_ends_the_run(one_block, tmp_path, logged):
    (tmp_path / "file").write_text("in the place of a folder")
    result, _ = train(one_block, settings(steps=3), profile=tmp_path / "file" / "profile")
    assert result.history.steps == 3
    assert [line for line in logged() if line.startswith("Warning: the JAX profile is not written (")]


def test_validation_comes_when_it_is_wanted_and_changes_nothing(one_block, plain):
    def measured(**changes):
        result, weights = train(one_block, settings(batch_size=2, **changes))
        assert distance(weights, plain[1]) == 0.0
        return [row.step for row in result.history.rows if row.validation_loss is not None]

    assert measured() == [4]
    assert measured(validate_every=1) == [1, 2, 3, 4]
    assert measured(validate_every=3) == [3, 4]


def test_the_curve_is_shown_while_the_run_goes_on_and_an_error_there_never_ends_it(one_block, monkeypatch):
    monkeypatch.setattr(callback, "CURVE_SECONDS", 0.0)
    shown = []

    def show(rows):
        shown.append(len(rows))
        raise OSError("no room")

    train(one_block, settings(batch_size=2), show_curve=show)
    assert shown == [1, 2, 3, 4]


def test_validation_takes_the_first_held_out_sequences(one_block):
    given = data(held_out=4)
    first = {**given, "validation": {name: array[:3] for name, array in given["validation"].items()}}
    wanted = settings(batch_size=2)
    results = [
        train(one_block, wanted.model_copy(update={"validate_sequences": number}), chosen)[0]
        for number, chosen in ((3, given), (None, first), (None, given))
    ]
    asked, three, all_four = [result.history.rows[-1].validation_loss for result in results]
    assert asked == three != all_four


def test_early_stopping_gives_the_weights_of_the_lowest_held_out_loss(one_block, logged):
    # Random targets: what some sequences teach is wrong for others.
    given = data()
    wanted = settings(batch_size=4, epochs=40, learning_rate=0.05, validate_every=2, early_stopping=3)
    model = load_tiny(one_block, (1, 1), rank=2)
    history = trainer.fit(model, given, wanted).history
    held_out = [row.validation_loss for row in history.rows if row.validation_loss is not None]
    assert history.steps < 80
    assert min(held_out) < min(held_out[-3:])
    assert held_out.index(min(held_out)) == len(held_out) - 4
    assert f"Stopped after step {history.steps}" in logged()[0]
    causal = trainer.make_causal(model, wanted)
    causal.compile(optimizer=None, loss=None)
    loss = causal.evaluate(Batches(given["validation"], 4, model.mesh_shape), return_dict=True, verbose=0)["loss"]
    assert loss == pytest.approx(min(held_out), rel=1e-6)


def test_samples_are_taken_on_the_way_and_change_nothing(one_block, plain):
    tokenizer = format_of("keras").load_tokenizer(one_block)
    wanted = settings(batch_size=2, sample_every=2, sample_prompt="This movie was", sample_tokens=5)
    result, weights = train(one_block, wanted, tokenizer=tokenizer)
    assert distance(weights, plain[1]) == 0.0
    assert [sample.step for sample in result.history.samples] == [2, 4]
    assert {sample.prompt for sample in result.history.samples} == {"This movie was"}
    assert all(len(tokenizer.encode(sample.text)) <= 5 for sample in result.history.samples)


def test_sampling_again_compiles_nothing_and_sees_the_new_weights(presets):
    model = load_tiny(presets["gemma3"], (1, 2), rank=2)
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    sampler, settings = Sampler(causal), SamplerSettings(8, stop_ids=(1,))
    first = sampler([[2, 100, 101]], settings)
    assert sampler([[2, 100, 101]], settings) == first
    kernel = next(variable for variable in model.backbone.weights if variable.path.endswith("ffw_linear/kernel"))
    kernel.assign(-kernel.value)
    assert sampler([[2, 100, 101]], settings) != first
    assert sampler.begin._cache_size() == sampler.go_on._cache_size() == 1


def test_a_step_is_compiled_once_however_often_the_run_is_looked_at(one_block, caplog):
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train(one_block, settings(batch_size=2, epochs=3, validate_every=3))
    compiled = [
        record.getMessage() for record in caplog.records if "Finished XLA compilation of" in record.getMessage()
    ]
    assert sum("jit(train_step)" in message for message in compiled) == 1
    assert sum("jit(test_step)" in message for message in compiled) == 1
