"""Zero-shot sentiment: does the model find the held-out reviews' own labels, asked in one sentence?

Purpose: a task beside the loss. The review is followed by the beginning of an answer, and of two words the one that the
model gives the higher probability is its answer; nothing is trained or shown for it. Few reviews say little: with the
accuracy comes its interval.
Reads: `data/imdb/validation.parquet`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pyarrow import parquet

from stages.core.common.errors import StageError, shown_list
from stages.core.evaluate.review_losses import ReviewLosses
from stages.core.presets.tokenizer import Tokenizer
from stages.core.records.evaluate import Sentiment
from stages.core.tokenize.control_tokens import ControlTokens
from stages.core.tokenize.held_out import HeldOut, of_pairs

QUESTION = "\n\nOverall, this review is"
# By label.
WORDS = {1: " positive", 0: " negative"}
# Standard normal quantile of a two-sided interval of 95 %.
QUANTILE = 1.959964


def labelled(source: Path) -> tuple[list[str], np.ndarray]:
    """Return the texts of the reviews that have a label, and their labels.

    Args:
        source: `data/imdb/validation.parquet`.

    Raises:
        StageError: they are pairs, none has a label, or a label is another than 1 (positive) and 0.
    """
    rows = parquet.read_table(source).to_pylist()
    found = [each for each in rows if "text" in each and each["label"] is not None]
    others = sorted({str(each["label"]) for each in found if each["label"] not in WORDS})
    if others or not found:
        what = f"labels {shown_list(others)}" if others else f"{len(rows)} held-out rows, none a review with a label"
        raise StageError(
            f"The task sentiment must have reviews with labels 1 (positive) and 0 (negative). Received: {what}. Take "
            "sentiment out of evaluate.tasks, or name the column with prepare.label_column."
        )
    return [each["text"] for each in found], np.array([each["label"] for each in found])


def sequences(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> HeldOut:
    """Return each review with the question twice, answered by either word, which is all that is measured of it.

    Args:
        tokenizer: of the preset.
        texts: the reviews.
        max_length: tokens of a sequence; of a longer review only the beginning is read.
    """
    words = [tokenizer.encode(word) for word in WORDS.values()]
    question = tokenizer.encode(QUESTION)
    room = max(0, max_length - 1 - len(question) - max(map(len, words)))
    read = (ids[:room] for ids in ControlTokens(tokenizer).as_text(texts))
    return of_pairs([([tokenizer.bos, *ids, *question], word) for ids in read for word in words])


def scored(losses: ReviewLosses, labels: np.ndarray) -> Sentiment:
    """Return how often the likelier word is the label's.

    Args:
        losses: of the sequences that `sequences` returned.
        labels: of the reviews.
    """
    answers = np.array(list(WORDS))[np.argmin(losses.loss.reshape(-1, len(WORDS)), axis=1)]
    right, count = int((answers == labels).sum()), len(labels)
    low, high = wilson(right, count)
    return Sentiment(
        reviews=count,
        accuracy=round(right / count, 5),
        accuracy_low=round(low, 5),
        accuracy_high=round(high, 5),
        answered_positive_fraction=round(float(answers.mean()), 5),
    )


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the interval of 95 % of a proportion, `right` of `count` independent draws.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.

    Example:
        >>> [round(end, 3) for end in wilson(9, 10)]
        [0.596, 0.982]
    """
    share, spread = right / count, QUANTILE**2 / count
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))
