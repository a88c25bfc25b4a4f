"""What `data/metrics/prepare.json` holds: `prepare` writes it, `report` reads it."""

from __future__ import annotations

from stages.core.records.record import FileRecord, OrAbsent


class PrepareMetrics(FileRecord):
    """Reviews (or conversations): read, left out and why, changed by cleaning, kept.

    A share of positive ones is there only where the labels are 0 and 1. The mean length in characters is of all that
    are kept; a pair's is that of prompt and response together, a conversation's that of all turns.
    """

    reviews_read: int
    empty: int
    too_short: int
    duplicates: int
    other_conversations: int
    changed: int
    train_reviews: int
    validation_reviews: int
    train_positive_fraction: OrAbsent[float] = None
    validation_positive_fraction: OrAbsent[float] = None
    characters_mean: float
