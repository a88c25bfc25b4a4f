"""What `data/metrics/export.json` holds: `export` writes it."""

from __future__ import annotations

from stages.core.records.record import FileRecord, Record


class FormatMetrics(Record):
    """One format, read back and compared with the tuned model on a fixed text.

    `logit_difference` is the largest of any token at any position compared, `logit_tolerance` what it may be,
    `logit_range` the tuned model's largest logit minus its smallest. `same_choice_fraction` is of the positions at
    which both models find the same token likeliest. `seconds` counts writing, reading and comparing.
    """

    bytes: int
    logit_difference: float
    logit_tolerance: float
    logit_range: float
    same_choice_fraction: float
    seconds: float


class ExportMetrics(FileRecord):
    """All formats by name; `tokens` are those of the text, `positions` those whose logits were compared."""

    tokens: int
    positions: int
    formats: dict[str, FormatMetrics]
    peak_host_bytes: int
