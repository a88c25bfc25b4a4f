"""The task sentiment: what is asked, and how answers are counted, with answers that are known."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from stages.core.common.errors import StageError
from stages.core.evaluate import sentiment
from stages.core.evaluate.measure import measure
from stages.core.presets.tokenizer import Tokenizer
from stages.core.sharding.mesh import MeshShape
from tests.support.tiny_presets import tiny_proto

TEXTS = ["Avoid it.", "See it twice!", "Nobody in the cinema laughed, not even once.", "It's worth seeing."]
LABELS = [0, 1, 0, 1]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_proto(tiny_proto())


def write(path, labels, column="text"):
    parquet.write_table(pa.table({column: TEXTS[: len(labels)], "label": labels}), path)
    return path


def test_reviews_without_a_label_are_left_out(tmp_path):
    texts, labels = sentiment.labelled(write(tmp_path / "some.parquet", [0, None, 0, 1]))
    assert texts == [TEXTS[0], *TEXTS[2:]]
    assert labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "column", "told"),
    [([0, 1, 2], "text", "labels 2"), ([None, None], "text", "none"), ([0, 1], "response", "none")],
)
def test_other_labels_and_none_are_told(tmp_path, labels, column, told):
    with pytest.raises(StageError, match=told):
        sentiment.labelled(write(tmp_path / "some.parquet", labels, column))


def test_each_review_is_asked_about_with_either_word_and_a_long_one_keeps_the_question(tokenizer):
    found = sentiment.sequences(tokenizer, TEXTS, 64)
    ends = found["offsets"].tolist()
    told = [tokenizer.decode(found["token_ids"][start:end]) for start, end in itertools.pairwise(ends)]
    assert told == [text + sentiment.QUESTION + word for text in TEXTS for word in sentiment.WORDS.values()]
    answers = [tokenizer.decode(found["token_ids"][s:e][found["is_target"][s:e]]) for s, e in itertools.pairwise(ends)]
    assert answers == list(sentiment.WORDS.values()) * len(TEXTS)
    short = sentiment.sequences(tokenizer, ["It " * 100], 48)
    assert np.diff(short["offsets"]).max() == 48
    assert tokenizer.decode(short["token_ids"]).count(sentiment.QUESTION) == 2


def test_the_likelier_word_is_the_answer_whatever_its_tokens(tokenizer):
    """A model that answers "positive" to the first two reviews, "negative" to the others, each token alike."""
    asked = sentiment.sequences(tokenizer, TEXTS, 64)
    sizes = [asked["is_target"][s:e].sum() for s, e in itertools.pairwise(asked["offsets"])]
    totals = iter([1.0, 2.0, 1.0, 2.0, 2.0, 1.0, 2.0, 1.0])
    per_token = {row: total / size for row, (total, size) in enumerate(zip(totals, sizes, strict=True))}
    starts = {
        tuple(asked["token_ids"][s : e - 1]): row for row, (s, e) in enumerate(itertools.pairwise(asked["offsets"]))
    }

    def model(batches):
        losses = []
        for batch in (batches[place][0] for place in range(len(batches))):
            for ids in batch["token_ids"]:
                row = next((row for begin, row in starts.items() if tuple(ids[: len(begin)]) == begin), None)
                losses.append(np.full(len(ids), 9.0 if row is None else per_token[row]))
        return np.array(losses), np.zeros((len(losses), len(losses[0])), bool)

    losses = measure(model, asked, MeshShape((1, 1)), max_length=64, batch_tokens=256)
    found = sentiment.scored(losses, np.array(LABELS))
    assert (found.reviews, found.accuracy, found.answered_positive_fraction) == (4, 0.5, 0.5)
    assert sentiment.scored(losses, np.array([1, 1, 0, 0])).accuracy == 1.0


def test_the_interval_is_wilsons():
    # R. G. Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
    for right, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert sentiment.wilson(right, count) == pytest.approx((low, high), abs=5e-5)
