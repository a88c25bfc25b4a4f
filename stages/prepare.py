"""Clean the reviews, and choose those to train on and those held out.

Reads: params `prepare`; the IMDb sample's package, TensorFlow Datasets, or the user's own files.
Writes: `data/imdb/train.parquet`, `data/imdb/validation.parquet`, `data/metrics/prepare.json`;
links in `data/inputs/` to the user's files that it read.
Command: python -m stages.prepare
"""

from __future__ import annotations

from stages.core.cli import Run, logger, stage
from stages.core.common.paths import REVIEWS, cache_folder


@stage
def main(run: Run) -> None:
    """Choose, clean, split and store the reviews."""
    from stages.core.common import inputs
    from stages.core.prepare.parquet_file import write_reviews
    from stages.core.prepare.sources import describe, own_inputs, prepare_reviews, summary

    parts, tally = prepare_reviews(run.params.prepare, run.paths.root, cache_folder())
    for key, path in own_inputs(run.params.prepare, run.paths.root).items():
        inputs.declare(run.paths, "prepare", key, path)
    for part, reviews in parts.items():
        write_reviews(run.paths.write(REVIEWS[part]), reviews)
    run.write_metrics("prepare", describe(parts, tally))
    logger.info(summary(parts, tally))


if __name__ == "__main__":
    main()
