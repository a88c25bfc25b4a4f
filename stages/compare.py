"""Compare each variant of the model with the baseline on the same held-out reviews, review by review.

Reads: `data/evaluations/<variant>.csv`; params `variants`.
Writes: `data/metrics/compare.json`.
Command: `python -m stages.compare`
"""

from __future__ import annotations

from stages.core.cli import Run, logger, stage
from stages.core.common.paths import evaluation


@stage
def main(run: Run) -> None:
    """Compare each variant of the model with the baseline on the same held-out reviews."""
    from stages.core.evaluate.review_losses import comparison, read_losses

    names = ("baseline", "tuned", *run.params.variants)
    values = comparison({name: read_losses(run.paths.read(evaluation(name))) for name in names})
    run.write_metrics("compare", values)
    for name, each in {"tuned": values, **(values.variants or {})}.items():
        error = each.loss_difference_standard_error
        logger.info(
            f"Loss, {name} - baseline: {each.loss_difference:+.4f} nats per token"
            + ("" if error is None else f", paired standard error {error:.4f}")
            + f"; perplexity x {each.perplexity_ratio:.4f}"
        )


if __name__ == "__main__":
    main()
