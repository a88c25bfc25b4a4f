"""Compare the tuned model with the baseline on the same held-out reviews, review by review.

Reads: `data/evaluations/baseline.csv`, `data/evaluations/tuned.csv`.
Writes: `data/metrics/compare.json`.
Command: `python -m stages.compare`
"""

from __future__ import annotations

from stages.core.cli import Run, logger, stage
from stages.core.common.paths import evaluation


@stage
def main(run: Run) -> None:
    """Compare the tuned model with the baseline on the same held-out reviews."""
    from stages.core.evaluate.review_losses import difference, read_losses

    baseline, tuned = (read_losses(run.paths.read(evaluation(variant))) for variant in ("baseline", "tuned"))
    values = difference(baseline, tuned)
    run.write_metrics("compare", values)
    error = values.loss_difference_standard_error
    logger.info(
        f"Loss, tuned - baseline: {values.loss_difference:+.4f} nats per token"
        + ("" if error is None else f", paired standard error {error:.4f}")
        + f"; perplexity x {values.perplexity_ratio:.4f}"
    )


if __name__ == "__main__":
    main()
