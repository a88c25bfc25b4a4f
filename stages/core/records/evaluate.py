"""What `data/metrics/evaluate/*.json` and `compare.json` hold; losses are in nats per token."""

from __future__ import annotations

from stages.core.records.record import FileRecord, OrAbsent, Record


class Sentiment(Record):
    """The task sentiment: of `reviews` with a label the fraction that was answered rightly, with its 95 % interval."""

    reviews: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    answered_positive_fraction: float


class EvaluateMetrics(FileRecord):
    """A variant on whole held-out reviews.

    `loss` with its standard error over reviews (None for a single review), perplexity (exp of the loss),
    `token_accuracy` (targets that were the likeliest token, of all); `reviews` are those with a target, `reviews_cut`
    and `targets_cut` what is beyond `evaluate.max_length`. `sentiment` is there if it is in `evaluate.tasks`; `lm_eval`
    has for each task of the lm-evaluation-harness its scores, and their standard errors (`acc_stderr`).
    """

    loss: float
    loss_standard_error: float | None
    perplexity: float
    token_accuracy: float
    targets: int
    reviews: int
    reviews_cut: int
    targets_cut: int
    sentiment: OrAbsent[Sentiment] = None
    lm_eval: OrAbsent[dict[str, dict[str, float]]] = None


class Difference(Record):
    """A variant minus baseline, paired by review, with paired standard errors (None for a single review).

    `perplexity_ratio` is variant / baseline, exp of the difference of the losses.
    """

    loss_difference: float
    loss_difference_standard_error: float | None
    perplexity_ratio: float
    token_accuracy_difference: float
    token_accuracy_difference_standard_error: float | None
    targets: int
    reviews: int


class CompareMetrics(Difference, FileRecord):
    """Tuned minus baseline; `variants` has the same of the adapters that the setting `variants` names."""

    variants: OrAbsent[dict[str, Difference]] = None
