"""What `data/metrics/evaluate-*.json` and `compare.json` hold; losses are in nats per token."""

from __future__ import annotations

from stages.core.records.record import FileRecord


class EvaluateMetrics(FileRecord):
    """A variant on whole held-out reviews.

    `loss` with its standard error over reviews (None for a single review), perplexity (exp of the loss),
    `token_accuracy` (targets that were the likeliest token, of all); `reviews` are those with a target, `reviews_cut`
    and `targets_cut` what is beyond `evaluate.max_length`.
    """

    loss: float
    loss_standard_error: float | None
    perplexity: float
    token_accuracy: float
    targets: int
    reviews: int
    reviews_cut: int
    targets_cut: int


class CompareMetrics(FileRecord):
    """Tuned minus baseline, paired by review, with paired standard errors (None for a single review).

    `perplexity_ratio` is tuned / baseline, exp of the difference of the losses.
    """

    loss_difference: float
    loss_difference_standard_error: float | None
    perplexity_ratio: float
    token_accuracy_difference: float
    token_accuracy_difference_standard_error: float | None
    targets: int
    reviews: int
