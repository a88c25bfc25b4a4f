"""The Parquet files of reviews: columns text, label, id.

Purpose: the same reviews give the same bytes.
Writes: `data/imdb/train.parquet`, `data/imdb/validation.parquet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stages.core.files import atomic_path
from stages.core.reviews import Review


def write_reviews(path: Path, reviews: Sequence[Review]) -> None:
    """Write reviews in order.

    Columns: `text` (string), `label` (int8 where the labels are small whole numbers or there are none, else int64 or
    string; null where a review has none), `id` (string).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = [review.label for review in reviews]
    known = [label for label in labels if label is not None]
    if any(isinstance(label, str) for label in known):
        kind = pa.string()
    else:
        kind = pa.int8() if all(-128 <= label <= 127 for label in known) else pa.int64()
    table = pa.table(
        {
            "text": pa.array([review.text for review in reviews], pa.string()),
            "label": pa.array(labels, kind),
            "id": pa.array([review.id for review in reviews], pa.string()),
        }
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
