"""The loss of each held-out review, and what follows from it: means, standard errors, and the difference to a baseline.

Reads and writes: `data/evaluations/<variant>.csv`, one row per held-out review, with the columns
    review    its row in `data/imdb/validation.parquet`
    sequence  first 16 hexadecimal digits of the SHA-256 of what was measured: its token ids and which are targets
    targets   predicted tokens
    cut       targets beyond evaluate.max_length, which were not measured
    loss      sum of the targets' losses in nats
    correct   targets that were the model's likeliest token
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.core.common.errors import StageError, shown
from stages.core.files import atomic_path
from stages.core.records.evaluate import CompareMetrics, Difference, EvaluateMetrics

COLUMNS = {"review": int, "sequence": str, "targets": int, "cut": int, "loss": float, "correct": int}
# Beyond it exp(loss) is no float64: the model is no model of text any more.
MOST_NATS = 700


@dataclass(frozen=True)
class ReviewLosses:
    """What was measured of each review; every field has one entry per review, see the columns above."""

    review: np.ndarray
    sequence: np.ndarray
    targets: np.ndarray
    cut: np.ndarray
    loss: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True)
class Ratio:
    """A mean over all targets, and its standard error over reviews (None for a single review, or no finite mean)."""

    value: float
    standard_error: float | None


def write_losses(path: Path, losses: ReviewLosses) -> None:
    """Write the reviews as CSV, atomically; the losses to the last digit."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(zip(*(getattr(losses, name).tolist() for name in COLUMNS), strict=True))


def read_losses(path: Path) -> ReviewLosses:
    """Read what `write_losses` wrote.

    Raises:
        StageError: the file does not have its form.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            if reader.fieldnames != list(COLUMNS):
                raise ValueError(f"columns {', '.join(reader.fieldnames or ['none'])}")
            rows = list(reader)
        return ReviewLosses(**{name: np.array([kind(row[name]) for row in rows]) for name, kind in COLUMNS.items()})
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise StageError(
            f"{path} must hold the columns {', '.join(COLUMNS)} in every row. Received: {shown(error)}. "
            "Run `dvc repro`."
        ) from error


def ratio(totals: np.ndarray, sizes: np.ndarray) -> Ratio:
    """Return sum(totals) / sum(sizes), with its standard error over reviews as independent draws.

    A review is one draw of (total, size), so the mean over tokens is a ratio of two random sums. Its variance, to first
    order, is

        n / (n - 1) x sum((total_i - value x size_i)^2) / sum(size_i)^2

    over n reviews (W. G. Cochran, Sampling Techniques, 3rd edition, 1977, chapter 6, with a sampling fraction of
    zero). With the differences of two models on the same reviews as totals it is the paired standard error.

    Args:
        totals: (reviews,) sums over each review's targets.
        sizes: (reviews,) numbers of targets; reviews without one are left out.
    """
    totals, sizes = totals[sizes > 0].astype(np.float64), sizes[sizes > 0]
    value, count = totals.sum() / sizes.sum(), len(sizes)
    if count == 1 or not math.isfinite(value):
        return Ratio(float(value), None)
    variance = count / (count - 1) * np.square(totals - value * sizes).sum() / sizes.sum() ** 2
    return Ratio(float(value), float(np.sqrt(variance)))


def metrics(variant: str, losses: ReviewLosses) -> EvaluateMetrics:
    """Return `data/metrics/evaluate/<variant>.json`.

    Args:
        variant: the model that was measured.
        losses: at least one target among them.

    Raises:
        StageError: loss or perplexity is not finite.
    """
    loss = ratio(losses.loss, losses.targets)
    if not math.isfinite(loss.value) or loss.value > MOST_NATS:
        raise StageError(
            f"The held-out loss must be a number of at most {MOST_NATS} nats per token. Received: loss={loss.value}, "
            f"variant={variant}. Nothing was overwritten. Look at the weights that models/{variant} was made from, and "
            "at finetune.learning_rate if it was tuned."
        )
    return EvaluateMetrics(
        loss=round(loss.value, 5),
        loss_standard_error=_rounded(loss.standard_error),
        perplexity=round(math.exp(loss.value), 4),
        token_accuracy=round(ratio(losses.correct, losses.targets).value, 5),
        targets=int(losses.targets.sum()),
        reviews=int(np.count_nonzero(losses.targets)),
        reviews_cut=int(np.count_nonzero(losses.cut)),
        targets_cut=int(losses.cut.sum()),
    )


def comparison(measured: Mapping[str, ReviewLosses]) -> CompareMetrics:
    """Return `data/metrics/compare.json`: tuned minus baseline, and each other variant minus baseline.

    Args:
        measured: what was measured, by variant.

    Raises:
        StageError: they were not measured on the same tokens.
    """
    found = {
        name: difference(measured["baseline"], losses, name) for name, losses in measured.items() if name != "baseline"
    }
    return CompareMetrics(**found.pop("tuned").model_dump(), variants=found or None)


def difference(baseline: ReviewLosses, other: ReviewLosses, name: str = "tuned") -> Difference:
    """Return a variant minus baseline, paired by review (for the standard errors see `ratio`).

    Args:
        baseline: what was measured of the baseline.
        other: what was measured of the variant.
        name: the variant's.

    Raises:
        StageError: the two were not measured on the same tokens.
    """
    for column in ("review", "sequence", "targets"):
        if not np.array_equal(getattr(baseline, column), getattr(other, column)):
            raise StageError(
                f"Baseline and {name} must be measured on the same held-out reviews. Received: "
                f"{len(baseline.review)} and {len(other.review)} reviews that differ in {column}. Run "
                "`python -m stages.evaluate` for both variants again."
            )
    loss = ratio(other.loss - baseline.loss, other.targets)
    accuracy = ratio(other.correct - baseline.correct, other.targets)
    return Difference(
        loss_difference=round(loss.value, 5),
        loss_difference_standard_error=_rounded(loss.standard_error),
        perplexity_ratio=round(math.exp(loss.value), 5),
        token_accuracy_difference=round(accuracy.value, 5),
        token_accuracy_difference_standard_error=_rounded(accuracy.standard_error),
        targets=int(other.targets.sum()),
        reviews=int(np.count_nonzero(other.targets)),
    )


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 5)
