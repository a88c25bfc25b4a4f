"""What `data/metrics/tokenize.json` holds: `tokenize` writes it, `report` reads it."""

from __future__ import annotations

from stages.core.records.record import FileRecord, OrAbsent, Record


class SplitCounts(Record):
    """What became of a split's tokens: see `packing.window_metrics` for reviews, `pair_packing.pair_metrics` for pairs.

    Reviews alone have `tokens_repeated`; pairs alone `response_tokens`, `pairs_cut`, `prompts_too_long` and
    `texts_trimmed`. `control_tokens_spelled` counts texts that spell a control token.
    """

    reviews: int
    sequences: int
    tokens_kept: int
    response_tokens: OrAbsent[int] = None
    tokens_cut: int
    tokens_repeated: OrAbsent[int] = None
    pairs_cut: OrAbsent[int] = None
    prompts_too_long: OrAbsent[int] = None
    positions_padded: int
    filled_fraction: float
    control_tokens_spelled: int
    texts_trimmed: OrAbsent[int] = None


class TokenizeMetrics(FileRecord):
    """Both splits, and the share of the training tokens that truncation instead of packing would cut."""

    train: SplitCounts
    tokens_cut_by_truncation_fraction: float
    validation: SplitCounts
