"""Cleaning, splitting, and what is counted."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.common.errors import ParamsError, StageError
from stages.core.prepare.cleaning import RawReview, Review, Tally, clean, clean_text
from stages.core.prepare.sources import describe
from stages.core.prepare.split import hold_out, shuffled
from tests.support.prepare_runs import prepare, texts, write_jsonl


@pytest.mark.parametrize(
    "html_breaks, expected",
    [
        ("newline", "One.\n\nTwo.\nThree < four <b>"),
        ("space", "One. Two. Three < four <b>"),
        ("keep", " One. <br /><br />Two.<BR>Three < four <b> "),
    ],
)
def test_html_breaks_become_what_the_setting_says_and_nothing_else_changes(html_breaks, expected):
    assert clean_text(" One. <br /><br />Two.<BR>Three < four <b> ", html_breaks) == expected


def test_what_is_left_out_is_counted_by_its_reason():
    raw = ["good one", "", "   ", None, "<br /><br/>", "no", "good one", "good<br>one", "good\none"]
    tally = Tally()
    kept = list(
        clean([RawReview(text, 1, str(row)) for row, text in enumerate(raw)], "newline", 3, "drop", set(), tally)
    )
    assert kept == [Review("good one", 1, "0"), Review("good\none", 1, "7")]
    assert tally == Tally(read=9, empty=4, too_short=1, duplicates=2, changed=1)
    assert tally.read == len(kept) + tally.empty + tally.too_short + tally.duplicates


def test_kept_breaks_leave_the_text_untouched_down_to_its_white_space():
    kept = list(clean([RawReview("  a <br />b\t", None, "0")], "keep", 3, "drop", set(), Tally()))
    assert texts(kept) == ["  a <br />b\t"]


def labelled(counts):
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Review(f"text {row}", label, str(row)) for row, label in enumerate(shuffled(labels, 1))]


@settings(deadline=None, max_examples=100)
@given(
    counts=st.dictionaries(st.sampled_from([0, 1, "a", "b", None]), st.integers(1, 40), min_size=1),
    share=st.floats(0, 0.999),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_label_is_held_out_in_proportion_to_within_one_review(counts, share, seed):
    reviews = labelled(counts)
    count = int(share * len(reviews))
    train, held = hold_out(reviews, count, seed)
    assert len(held) == count
    assert sorted(train + held, key=lambda review: int(review.id)) == reviews
    assert train == [review for review in reviews if review in set(train)], "the order is kept"
    for label, number in Counter(review.label for review in reviews).items():
        held_of_label = sum(review.label == label for review in held)
        assert abs(held_of_label - count * number / len(reviews)) < 1


def test_the_split_depends_on_the_seed_and_on_nothing_else():
    reviews = labelled({0: 50, 1: 50})
    first, again, other = (hold_out(reviews, 20, seed)[1] for seed in (0, 0, 1))
    assert first == again != other
    assert Counter(review.label for review in first) == {0: 10, 1: 10}


def test_equal_remainders_do_not_always_favour_the_label_that_comes_first():
    winners = {
        hold_out([Review("a", 0, "0"), Review("b", 1, "1"), Review("c", 0, "2"), Review("d", 1, "3")], 1, seed)[1][
            0
        ].label
        for seed in range(20)
    }
    assert winners == {0, 1}


def test_holding_out_all_reviews_is_refused():
    with pytest.raises(ValueError, match=r"Received: count=2"):
        hold_out(labelled({0: 1, 1: 1}), 2, 0)


def test_the_first_reviews_are_taken_in_order_when_nothing_is_shuffled(tmp_path):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": f"review {row}"} for row in range(10)])
    parts, _ = prepare(tmp_path, take=4)
    left = [f"review {row}" for row in range(10) if f"review {row}" not in texts(parts["validation"])]
    assert texts(parts["train"]) == left[:4]
    assert len(parts["validation"]) == 2


def test_shuffling_changes_the_order_and_keeps_the_reviews(tmp_path):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": f"review {row}"} for row in range(40)])
    orders = [texts(prepare(tmp_path, shuffle=True, seed=seed)[0]["train"]) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    plain = prepare(tmp_path)[0]["train"]
    assert orders[0] != texts(plain)
    assert len(set(orders[0])) == len(plain) == 38


def test_no_review_is_in_both_parts_of_one_file(tmp_path):
    rows = [{"text": f"review {row % 7}"} for row in range(30)]
    write_jsonl(tmp_path / "reviews.jsonl", rows)
    parts, tally = prepare(tmp_path)
    assert not set(texts(parts["train"])) & set(texts(parts["validation"]))
    assert (tally.read, tally.duplicates) == (30, 23)


def test_a_held_out_review_is_left_out_of_the_training_file(tmp_path):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": text} for text in ("first", "se<br />cond", "third")])
    write_jsonl(tmp_path / "held.jsonl", [{"text": text} for text in ("se<br/>cond", "fourth", "fourth")])
    parts, tally = prepare(tmp_path, validation_file="held.jsonl")
    assert texts(parts["train"]) == ["first", "third"]
    assert texts(parts["validation"]) == ["se\ncond", "fourth"], "the whole file is held out"
    assert tally.duplicates == 2
    assert parts["validation"][0].id == "held.jsonl:0"


@pytest.mark.parametrize("validation", [3, 4])
def test_at_least_one_review_must_be_left_to_train_on(tmp_path, validation):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": text} for text in ("first", "second", "third", "", "no")])
    with pytest.raises(
        ParamsError,
        match=rf"left after cleaning, 3 \(of 5 read 1 empty, 1 .*\. Received: prepare\.validation={validation}",
    ):
        prepare(tmp_path, validation=validation)


def test_files_with_nothing_that_is_long_enough_are_told_with_the_counts(tmp_path):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": "short"}, {"text": ""}])
    write_jsonl(tmp_path / "held.jsonl", [{"text": "a much longer text"}])
    with pytest.raises(
        StageError, match=r"No review is left to train on: of 3 read 1 empty, 1 too short, 0 duplicates\."
    ):
        prepare(tmp_path, validation_file="held.jsonl", min_characters=10)
    with pytest.raises(
        StageError, match=r"No review is left to hold out: of 1 read 0 empty, 1 too short, 0 duplicates\."
    ):
        prepare(tmp_path, validation_file="held.jsonl", min_characters=100)


def test_the_metrics_count_everything_and_hold_no_time():
    parts = {"train": labelled({0: 3, 1: 1}), "validation": labelled({1: 1, 0: 1})}
    assert describe(parts, Tally(9, 1, 1, 1)).content() == {
        "reviews_read": 9,
        "empty": 1,
        "too_short": 1,
        "duplicates": 1,
        "other_conversations": 0,
        "changed": 0,
        "train_reviews": 4,
        "validation_reviews": 2,
        "train_positive_fraction": 0.25,
        "validation_positive_fraction": 0.5,
        "characters_mean": 6.0,
    }


@pytest.mark.parametrize("label", ["good", None, 2])
def test_only_labels_of_0_and_1_have_a_positive_fraction(label):
    parts = {"train": [Review("a", label, "0")], "validation": [Review("b", label, "1")]}
    assert not [key for key in describe(parts, Tally()).content() if "fraction" in key]
