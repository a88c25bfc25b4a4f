"""The reviews to train on and those held out, from whichever source the settings name.

Purpose: read, clean, shuffle, split and take, in this order, the same bytes for the same settings.
Reads: params `prepare`, and the source.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from stages.core.common.errors import ParamsError, StageError, shown
from stages.core.common.paths import own_path
from stages.core.config.schema import Prepare
from stages.core.prepare.cleaning import RawReview, Review, Tally, clean
from stages.core.prepare.imdb import full_reviews, sample_reviews
from stages.core.prepare.own_files import columns_of, data_files, file_reviews
from stages.core.prepare.split import hold_out, shuffled
from stages.core.records.prepare import PrepareMetrics


def prepare_reviews(settings: Prepare, root: Path, cache: Path) -> tuple[dict[str, list[Review]], Tally]:
    """Return the reviews of `train` and `validation`, and what was read and left out.

    A review that is in both parts of its source stays in `validation` and is left out of `train`; of `imdb_reviews`
    with `duplicates: keep` it is the other way round.

    Args:
        settings: the section `prepare`.
        root: the repository's folder, which relative paths start from.
        cache: the cache folder.

    Raises:
        ParamsError: a wrong path or column, or more reviews held out than there are.
        StageError: the source is not available, or nothing is left to train on.
    """
    train, validation = _open(settings, root, cache)
    tally = Tally()
    # What suits IMDb's reviews is not done to a user's own texts unasked.
    own = settings.source == "files"
    html_breaks = ("keep" if own else "newline") if settings.html_breaks == "auto" else settings.html_breaks
    min_characters = settings.min_characters or (1 if own else 32)

    def cleaned(raw: Iterable[RawReview], known: set[tuple[str, ...]]) -> Iterable[Review]:
        return clean(raw, html_breaks, min_characters, settings.duplicates, known, tally)

    def to_train(known: set[tuple[str, ...]]) -> list[Review]:
        # Shuffling needs them all; else reading ends with the last that is taken.
        return list(islice(cleaned(train, known), None if settings.shuffle else settings.take))

    def in_order(reviews: list[Review]) -> list[Review]:
        return shuffled(reviews, settings.seed) if settings.shuffle else reviews

    if validation is None:
        reviews = in_order(list(cleaned(train, set())))
        _check_some(reviews, "train on", tally)
        # Kept repeats are split as one: a review is either trained on or held out.
        once = list({review.content: review for review in reversed(reviews)}.values())[::-1]
        _check_enough(settings.validation, once, tally)
        held = hold_out(once, settings.validation, settings.seed)[1]
        contents = {review.content for review in held}
        left = [review for review in reviews if review.content not in contents]
        tally.duplicates += len(reviews) - len(left) - len(held)
        reviews = left
    elif settings.source == "imdb_reviews" and settings.duplicates == "keep":
        # The training part as it comes, the tutorial's; what is in both parts is not measured on.
        reviews = in_order(to_train(set()))[: settings.take]
        held = list(cleaned(validation, {review.content for review in reviews}))
        _check_enough(settings.validation, held, tally)
        held = hold_out(held, settings.validation, settings.seed)[1]
    else:
        held = list(cleaned(validation, set()))
        _check_some(held, "hold out", tally)
        if settings.source == "imdb_reviews":
            _check_enough(settings.validation, held, tally)
            held = hold_out(held, settings.validation, settings.seed)[1]
        # What the held-out part does not use may be trained on.
        reviews = in_order(to_train({review.content for review in held}))
    _check_some(reviews, "train on", tally)
    return {"train": reviews[: settings.take], "validation": held}, tally


def own_inputs(settings: Prepare, root: Path) -> dict[str, Path | None]:
    """Return the user's files and the dataset's folder by their keys; None for what the source does not read."""
    found: dict[str, Path | None] = {}
    for key in ("train_file", "validation_file"):
        value = getattr(settings, key)
        found[key] = None if value is None else _one_place(f"prepare.{key}", value, data_files, root)
    found["data_dir"] = None if settings.data_dir is None else own_path(root, "prepare.data_dir", settings.data_dir)
    if settings.source == "imdb_reviews":
        # Where TensorFlow Datasets keeps what it prepared, if no folder is named.
        default = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
        found["data_dir"] = (found["data_dir"] or default) / "imdb_reviews"
    return found


def _one_place(
    setting: str, value: str | list[str], files: Callable[[Path, str, str | list[str]], list[Path]], root: Path
) -> Path:
    """Return the file that a setting names, or the folder of several: a file that is added there counts too.

    Raises:
        ParamsError: the folder of several is the repository, or one that it is in, with all that the pipeline writes.
    """
    found = files(root, setting, value)
    if isinstance(value, str) and found == [own_path(root, setting, value)]:
        return found[0]
    folder = Path(os.path.commonpath([os.path.normpath(path.parent) for path in found]))
    if root.is_relative_to(folder):
        raise ParamsError(
            f"{setting} must name several files in a folder of their own, so that DVC sees a change of any. "
            f"Received: {setting}={shown(value)}, in {shown(folder)}"
        )
    return folder


def describe(parts: dict[str, list[Review]], tally: Tally) -> PrepareMetrics:
    """Return `data/metrics/prepare.json`."""

    def positive_fraction(reviews: list[Review]) -> float | None:
        labels = [review.label for review in reviews]
        return round(labels.count(1) / len(labels), 4) if set(labels) <= {0, 1} else None

    kept = [review for reviews in parts.values() for review in reviews]
    return PrepareMetrics(
        reviews_read=tally.read,
        empty=tally.empty,
        too_short=tally.too_short,
        duplicates=tally.duplicates,
        other_conversations=tally.other_conversations,
        changed=tally.changed,
        train_reviews=len(parts["train"]),
        validation_reviews=len(parts["validation"]),
        train_positive_fraction=positive_fraction(parts["train"]),
        validation_positive_fraction=positive_fraction(parts["validation"]),
        characters_mean=round(sum(len(part) for review in kept for part in review.content) / len(kept), 1),
    )


def summary(parts: dict[str, list[Review]], tally: Tally) -> str:
    """Return one line for the user: how many reviews (or pairs) there are, and what was left out."""
    what = "reviews" if parts["train"][0].prompt is None else "pairs of prompt and response"
    several = sum(bool(review.earlier) for reviews in parts.values() for review in reviews)
    longer = f" With more than one prompt and response: {several:,}." if several else ""
    changed = f" Changed: {tally.changed:,}, in HTML breaks or white space at the ends (prepare.html_breaks)."
    return (
        f"{len(parts['train']):,} {what} to train on and {len(parts['validation']):,} held out, "
        f"of {tally.read:,} read. Left out: {_left_out(tally)}.{longer}{changed if tally.changed else ''}"
    )


def _open(settings: Prepare, root: Path, cache: Path) -> tuple[Iterable[RawReview], Iterable[RawReview] | None]:
    """Return the raw reviews to train on, and those to hold out where the source has a part of its own for that."""
    if settings.source == "imdb_sample":
        return sample_reviews(cache), None
    if settings.source == "imdb_reviews":
        data_dir = None if settings.data_dir is None else own_path(root, "prepare.data_dir", settings.data_dir)
        return full_reviews("train", data_dir), full_reviews("test", data_dir)
    columns = columns_of(
        settings.format,
        settings.text_column,
        settings.label_column,
        settings.prompt_column,
        settings.response_column,
    )

    def read(setting: str, value: str | list[str]) -> list[RawReview]:
        return file_reviews(data_files(root, setting, value), setting, columns)

    held = None if settings.validation_file is None else read("prepare.validation_file", settings.validation_file)
    return read("prepare.train_file", settings.train_file or []), held


def _check_some(reviews: list[Review], purpose: str, tally: Tally) -> None:
    """Stop when no review is left."""
    if not reviews:
        hint = "\nSee prepare.min_characters." if tally.too_short else ""
        raise StageError(f"No review is left to {purpose}: of {tally.read:,} read {_left_out(tally)}.{hint}")


def _check_enough(count: int, reviews: list[Review], tally: Tally) -> None:
    """Stop when as many reviews as there are, or more, are to be held out."""
    if count >= len(reviews):
        raise ParamsError(
            f"prepare.validation must be less than the number of reviews left after cleaning, {len(reviews):,} "
            f"(of {tally.read:,} read {_left_out(tally)}). Received: prepare.validation={count}"
        )


def _left_out(tally: Tally) -> str:
    """Return the counts of reviews left out, in words."""
    other = f", {tally.other_conversations:,} conversations in which user and model do not take turns"
    counts = f"{tally.empty:,} empty, {tally.too_short:,} too short, {tally.duplicates:,} duplicates"
    return counts + (other if tally.other_conversations else "")
