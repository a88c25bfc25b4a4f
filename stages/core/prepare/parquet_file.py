"""The Parquet files of reviews: columns text, label, id; of pairs: prompt, response, label, id; of longer ones earlier,
and of those that a system begins system.

Purpose: the same reviews give the same bytes. A file's columns show which of the two it is.
Writes: `data/imdb/train.parquet`, `data/imdb/validation.parquet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.files import atomic_path
from stages.core.prepare.cleaning import Review


def write_reviews(path: Path, reviews: Sequence[Review]) -> None:
    """Write reviews in order.

    Columns: `text`, or `prompt` and `response` of pairs (string), with `earlier` where there are conversations of more
    than one prompt and response (the turns before these, prompts and responses in turn; list of string) and `system`
    where a system says something before one (string, null where not), `label` (int8
    where the labels are small whole numbers or there are none, else int64 or string; null where a review has none),
    `id` (string).
    """
    labels = [review.label for review in reviews]
    numbers = [label for label in labels if label is not None and not isinstance(label, str)]
    if len(numbers) < sum(label is not None for label in labels):
        kind = pa.string()
    else:
        kind = pa.int8() if all(-128 <= number <= 127 for number in numbers) else pa.int64()
    texts = pa.array([review.text for review in reviews], pa.string())
    pairs = any(review.prompt is not None for review in reviews)
    prompts = {"prompt": pa.array([review.prompt for review in reviews], pa.string())} if pairs else {}
    if any(review.earlier for review in reviews):
        prompts = {"earlier": pa.array([review.earlier for review in reviews], pa.list_(pa.string())), **prompts}
    if any(review.system for review in reviews):
        prompts = {"system": pa.array([review.system for review in reviews], pa.string()), **prompts}
    table = pa.table(
        {
            **prompts,
            "response" if pairs else "text": texts,
            "label": pa.array(labels, kind),
            "id": pa.array([review.id for review in reviews], pa.string()),
        }
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
