"""Measuring on whole held-out reviews: each as if read alone, whatever surrounds it; and what is computed from it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from stages.core.common.errors import StageError
from stages.core.evaluate import measure as evaluation
from stages.core.evaluate import review_losses
from stages.core.evaluate.review_losses import ReviewLosses
from stages.core.model.causal_lm import make_model
from stages.core.sharding.mesh import MeshShape
from stages.core.tokenize import held_out
from tests.support.repository import FAMILIES
from tests.support.tiny_models import keras_hub_reads, load_tiny

BOS, EOS = 2, 1
# Prompt and response; of a review the prompt is BOS. One is longer than every sliding window and bucket but the last.
SIZES = [(1, 40), (1, 300), (1, 1), (30, 10), (1, 129), (140, 3), (1, 128), (1, 64), (12, 190)]

# Those that are read alone too: a long review, one of a single token, and a pair.
ALONE = (1, 2, 3)


def pairs() -> list[tuple[list[int], list[int]]]:
    """Random tokens of these sizes, each sequence with BOS first."""
    generator = np.random.default_rng(0)
    drawn = [[generator.integers(4, 512, size).tolist() for size in pair] for pair in SIZES]
    return [([BOS, *prompt[1:]], response) for prompt, response in drawn]


def measure(
    folder: Path, shape: tuple[int, int] = (1, 1), max_length: int = 512, batch_tokens: int = 512, rank: int | None = 2
) -> ReviewLosses:
    """Measure these sequences under a tiny model, with an adapter unless there is no rank."""
    model = load_tiny(folder, shape, rank=rank)
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    causal.compile(optimizer=None, loss=None, jit_compile=True)
    sequences = held_out.of_pairs(pairs())
    return evaluation.measure(
        causal.token_losses, sequences, model.mesh_shape, max_length=max_length, batch_tokens=batch_tokens
    )


def uniform(batches) -> tuple[np.ndarray, np.ndarray]:
    """A model that gives each target the loss 1 and is right where the target is an even number."""
    targets = np.concatenate([batches[step][0]["target_ids"] for step in range(len(batches))])
    return np.ones(targets.shape, np.float32), targets % 2 == 0


@pytest.fixture(scope="module")
def whole(one_block) -> ReviewLosses:
    """The sequences measured on one device, none cut."""
    return measure(one_block)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_review_is_measured_as_keras_hub_reads_it_alone(presets, family):
    measured = measure(presets[family], rank=None)
    read = keras_hub_reads(presets[family])
    for row in ALONE:
        prompt, response = pairs()[row]
        ids = np.array([[*prompt, *response]], np.int32)
        logits = np.asarray(read(ids[:, :-1])[1])[0, len(prompt) - 1 :].astype(np.float64)
        likelihoods = log_softmax(logits, axis=-1)[np.arange(len(response)), response]
        assert measured.loss[row] == pytest.approx(-likelihoods.sum(), rel=2e-5)
        assert measured.correct[row] == (logits.argmax(axis=-1) == response).sum()
    assert measured.targets.tolist() == [response for _, response in SIZES]
    assert not measured.cut.any()


@pytest.mark.parametrize(("shape", "batch_tokens"), [((1, 1), 1), ((1, 8), 4096), ((4, 2), 512)], ids=str)
def test_mesh_and_batch_change_no_reviews_loss(one_block, whole, shape, batch_tokens):
    measured = measure(one_block, shape, batch_tokens=batch_tokens)
    np.testing.assert_allclose(measured.loss, whole.loss, rtol=2e-5)
    assert measured.correct.tolist() == whole.correct.tolist()
    assert measured.targets.tolist() == whole.targets.tolist()
    assert measured.sequence.tolist() == whole.sequence.tolist()


def test_the_lengths_that_reviews_are_padded_to_change_no_reviews_loss(one_block, whole, monkeypatch):
    monkeypatch.setattr(evaluation, "bucket_lengths", lambda sizes: [400])
    np.testing.assert_allclose(measure(one_block).loss, whole.loss, rtol=2e-5)


def test_a_longer_review_is_measured_up_to_the_maximum_and_what_is_cut_is_counted(one_block, whole):
    cut = measure(one_block, max_length=130)
    # Of the first 130 inputs, targets are the tokens 1 to 130.
    left = [max(0, min(131, prompt + response) - prompt) for prompt, response in SIZES]
    assert cut.targets.tolist() == left
    assert (cut.targets + cut.cut).tolist() == whole.targets.tolist()
    fits = cut.cut == 0
    assert fits.tolist() == [True, False, True, True, True, False, True, True, False]
    np.testing.assert_allclose(cut.loss[fits], whole.loss[fits], rtol=2e-5)
    assert (cut.sequence == whole.sequence).tolist() == fits.tolist()
    assert (cut.loss[~fits] < whole.loss[~fits]).all()
    metrics = review_losses.metrics("tuned", cut)
    assert (metrics.reviews, metrics.reviews_cut) == (8, 3), "one pair's prompt alone is longer"
    assert metrics.targets_cut == sum(response for _, response in SIZES) - sum(left)
    assert metrics.targets == sum(left)


def test_targets_that_were_not_measured_fail_the_evaluation():
    """As KERAS_MAX_STEPS_PER_EPOCH cuts a pass."""
    sequences = held_out.of_reviews([[5] * 100] * 4, bos=BOS, eos=EOS)
    whole = evaluation.measure(uniform, sequences, MeshShape((1, 1)), max_length=512, batch_tokens=256)
    assert whole.targets.tolist() == [101] * 4
    short = lambda batches: tuple(each[:2] for each in uniform(batches))  # noqa: E731
    with pytest.raises(StageError, match=r"Every target must be measured: expected 404\. Received: targets=202"):
        evaluation.measure(short, sequences, MeshShape((1, 1)), max_length=512, batch_tokens=256)


@pytest.mark.parametrize("reviews", [[], [[]], [[], []]], ids=str)
def test_reviews_without_a_target_are_refused(reviews):
    sequences = held_out.of_reviews(reviews, bos=BOS, eos=None)
    with pytest.raises(StageError, match="must have at least one target within 512 tokens"):
        evaluation.measure(uniform, sequences, MeshShape((1, 1)), max_length=512, batch_tokens=256)


def test_a_review_without_a_target_among_others_counts_for_nothing():
    sequences = held_out.of_reviews([[4, 5], [], [6]], bos=BOS, eos=None)
    losses = evaluation.measure(uniform, sequences, MeshShape((2, 1)), max_length=8, batch_tokens=1)
    assert losses.targets.tolist() == [2, 0, 1]
    assert losses.correct.tolist() == [1, 0, 1]
    assert review_losses.metrics("tuned", losses).reviews == 2


def test_a_sequence_holds_bos_the_text_and_its_end_and_of_a_pair_each_response_is_the_target():
    reviews = held_out.of_reviews([[7, 8], []], bos=BOS, eos=EOS)
    assert reviews["token_ids"].tolist() == [BOS, 7, 8, EOS, BOS, EOS]
    assert reviews["is_target"].tolist() == [False, True, True, True, False, True]
    assert reviews["offsets"].tolist() == [0, 4, 6]
    pair = held_out.of_pairs([([BOS, 9, 10], [11, 12])])
    assert pair["token_ids"].tolist() == [BOS, 9, 10, 11, 12]
    assert pair["is_target"].tolist() == [False, False, False, True, True]
    both = held_out.of_pairs([([BOS], [5], [6, 7], [8]), ([BOS, 9], [10])])
    assert both["token_ids"].tolist() == [BOS, 5, 6, 7, 8, BOS, 9, 10]
    assert both["is_target"].tolist() == [False, True, False, False, True, False, False, True]
    assert both["offsets"].tolist() == [0, 5, 8]


@given(st.lists(st.integers(1, 1200), min_size=1, max_size=12), st.integers(1, 3))
def test_no_other_choice_of_as_many_lengths_has_fewer_positions(sizes, most):
    sizes = np.array(sizes)

    def positions(lengths) -> int:
        return sum(min(length for length in lengths if length >= size) for size in sizes)

    found = evaluation.bucket_lengths(sizes, most, 128)
    assert len(found) <= most
    assert found == sorted(found)
    assert all(length % 128 == 0 for length in found)
    possible = np.unique(-(-sizes // 128) * 128).tolist()
    others = [
        positions([*chosen, possible[-1]])
        for count in range(most)
        for chosen in itertools.combinations(possible[:-1], count)
    ]
    assert positions(found) == min(others)


@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from([1, 2, 8]))
def test_batches_are_as_many_as_they_must_be_and_few_of_their_rows_are_empty(count, most, multiple):
    rows = evaluation.batch_rows(count, most, multiple)
    largest = math.ceil(most / multiple) * multiple
    assert rows % multiple == 0
    assert 0 < rows <= largest
    assert math.ceil(count / rows) == math.ceil(count / largest)
    assert rows * math.ceil(count / rows) - count < math.ceil(count / rows) * multiple


def made_up(count: int, seed: int = 0) -> tuple[ReviewLosses, ReviewLosses]:
    """Losses of reviews of very different lengths before and after tuning; long ones gain less per token."""
    generator = np.random.default_rng(seed)
    targets = generator.geometric(1 / 250, count)
    before = targets * generator.normal(3.5, 0.4, count)
    after = before - targets * generator.normal(0.05, 0.06, count) * (200 / (targets + 100))
    rows = {"review": np.arange(count), "sequence": np.array([f"{i:016x}" for i in range(count)]), "targets": targets}
    return tuple(
        ReviewLosses(**rows, cut=np.zeros(count, int), loss=loss, correct=generator.binomial(targets, 0.3))
        for loss in (before, after)
    )


def test_the_paired_standard_error_is_what_drawing_reviews_anew_gives():
    baseline, tuned = made_up(400)
    compared = review_losses.difference(baseline, tuned)
    generator = np.random.default_rng(1)
    drawn = generator.integers(0, 400, (4000, 400))
    change = (tuned.loss - baseline.loss)[drawn].sum(axis=1) / tuned.targets[drawn].sum(axis=1)
    assert compared.loss_difference_standard_error == pytest.approx(change.std(), rel=0.05)
    right = (tuned.correct - baseline.correct)[drawn].sum(axis=1) / tuned.targets[drawn].sum(axis=1)
    assert compared.token_accuracy_difference_standard_error == pytest.approx(right.std(), rel=0.05)
    loss = baseline.loss[drawn].sum(axis=1) / baseline.targets[drawn].sum(axis=1)
    own = review_losses.metrics("baseline", baseline).loss_standard_error
    assert own == pytest.approx(loss.std(), rel=0.05)
    assert compared.loss_difference_standard_error < own / 2, "pairing is what makes it small"


def test_the_standard_error_is_that_of_a_mean_where_reviews_have_one_length_and_by_hand_where_not():
    one = review_losses.ratio(np.array([1.0, 2.0, 6.0]) * 10, np.array([10, 10, 10]))
    assert one.value == pytest.approx(3.0)
    assert one.standard_error == pytest.approx(np.std([1.0, 2.0, 6.0], ddof=1) / math.sqrt(3))
    # 10 + 20 nats over 4 + 6 tokens: 3 per token; residuals 10 - 12 and 20 - 18; 2 x (4 + 4) / 10^2.
    two = review_losses.ratio(np.array([10.0, 20.0, 0.0]), np.array([4, 6, 0]))
    assert (two.value, two.standard_error) == (3.0, pytest.approx(0.4))
    assert review_losses.ratio(np.array([3.0]), np.array([2])) == review_losses.Ratio(1.5, None)


def test_the_difference_is_that_of_the_two_losses_and_the_ratio_that_of_the_perplexities():
    baseline, tuned = made_up(50)
    before, after = review_losses.metrics("baseline", baseline), review_losses.metrics("tuned", tuned)
    compared = review_losses.difference(baseline, tuned)
    assert compared.loss_difference == pytest.approx(after.loss - before.loss, abs=2e-5)
    assert compared.perplexity_ratio == pytest.approx(after.perplexity / before.perplexity, rel=2e-5)
    change = after.token_accuracy - before.token_accuracy
    assert compared.token_accuracy_difference == pytest.approx(change, abs=2e-5)
    assert (compared.targets, compared.reviews) == (before.targets, before.reviews)


def test_each_further_variant_is_compared_with_the_baseline(tmp_path):
    baseline, tuned = made_up(50)
    other = made_up(50, seed=1)[1]
    other = ReviewLosses(**{**vars(tuned), "loss": tuned.loss + 1.0, "correct": other.correct})
    compared = review_losses.comparison({"baseline": baseline, "tuned": tuned, "mine": other})
    assert compared.variants == {"mine": review_losses.difference(baseline, other)}
    assert compared.loss_difference == review_losses.difference(baseline, tuned).loss_difference
    without = review_losses.comparison({"baseline": baseline, "tuned": tuned})
    assert "variants" not in without.content()
    with pytest.raises(StageError, match="Baseline and mine must be measured on the same"):
        review_losses.comparison({"baseline": baseline, "tuned": tuned, "mine": made_up(4)[1]})


def test_variants_that_were_measured_on_other_text_are_not_compared(tmp_path):
    baseline, tuned = made_up(3)
    for name, values in (("sequence", ["a", "b", "c"]), ("targets", [1, 2, 3])):
        other = ReviewLosses(**{**vars(tuned), name: np.array(values)})
        with pytest.raises(StageError, match=f"same held-out reviews. Received: 3 and 3 reviews that differ in {name}"):
            review_losses.difference(baseline, other)
    with pytest.raises(StageError, match="Received: 3 and 4 reviews that differ in review"):
        review_losses.difference(baseline, made_up(4)[1])


def test_what_is_written_of_each_review_is_read_again_to_the_last_digit(tmp_path):
    losses, _ = made_up(20)
    review_losses.write_losses(tmp_path / "losses.csv", losses)
    assert (tmp_path / "losses.csv").read_text().startswith("review,sequence,targets,cut,loss,correct\n0,")
    again = review_losses.read_losses(tmp_path / "losses.csv")
    for name, values in vars(losses).items():
        assert getattr(again, name).tolist() == values.tolist()
        assert getattr(again, name).dtype.kind == values.dtype.kind


@pytest.mark.parametrize(
    "text",
    ["", "review,loss\n0,1.5\n", "review,sequence,targets,cut,loss,correct\n0,ab,1,0\n", "review,sequence,targets,cut,"]
    + [
        f"review,sequence,targets,cut,loss,correct\n0,ab,{targets},0,{loss},1\n"
        for targets, loss in [(1.5, 2), (1, "")]
    ],
)
def test_a_file_of_losses_that_is_damaged_is_told_with_its_name(tmp_path, text):
    (tmp_path / "losses.csv").write_text(text)
    with pytest.raises(StageError, match=r"losses.csv must hold the columns review, sequence, .* Run `dvc repro`"):
        review_losses.read_losses(tmp_path / "losses.csv")


@pytest.mark.parametrize("loss", [math.nan, math.inf, 709.8])
def test_a_held_out_loss_that_is_no_number_or_has_no_perplexity_is_told(loss):
    losses, _ = made_up(2)
    bad = ReviewLosses(**{**vars(losses), "targets": np.ones(2, int), "loss": np.array([1.0, loss * 2])})
    with pytest.raises(StageError, match=r"at most 700 nats per token\. Received: loss=.*, variant=tuned"):
        review_losses.metrics("tuned", bad)
    good = ReviewLosses(**{**vars(bad), "loss": np.ones(2)})
    assert review_losses.metrics("tuned", good).perplexity == 2.7183


settings.register_profile("evaluation", deadline=None)
settings.load_profile("evaluation")
