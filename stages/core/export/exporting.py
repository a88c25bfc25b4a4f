"""Writing all formats, each proven right before the next one is begun."""

from __future__ import annotations

import functools
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.core.common.errors import StageError
from stages.core.common.sizes import megabytes
from stages.core.export import card, proof
from stages.core.export.formats import FORMATS, Job, left_out
from stages.core.export.tuned import RoundedWeights, SeparateWeights
from stages.core.presets.formats import format_of
from stages.core.presets.weight_table import StoredWeight
from stages.core.records.export import FormatMetrics

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Reference:
    """The tuned model, and its own reading of the text, which every format is compared with.

    Attributes:
        job: what is exported.
        weights: as they were trained.
        ids: of the text.
        reading: of the tuned model, in float32.
    """

    job: Job
    weights: SeparateWeights
    ids: list[int]
    reading: proof.Reading

    @functools.cache  # noqa: B019 (as many as there are types, and the process ends with it)
    def _rounded(self, dtype: np.dtype, in_float32: Callable[[StoredWeight], bool]) -> proof.Reading:
        weights = RoundedWeights(self.weights.merged(), dtype, in_float32)
        return proof.read(self.job.architecture, weights, self.ids)

    def of(self, name: str) -> proof.Reading:
        """Return what a format is compared with: the tuned model, or the tuned model rounded as the format rounds."""
        form = FORMATS[name]
        dtype = form.rounds(self.job)
        return self.reading if dtype is None else self._rounded(dtype, form.in_float32)


@contextmanager
def reference(job: Job) -> Iterator[Reference]:
    """Yield the tuned model's reading, as it was trained: the adapter beside the base, in float32."""
    ids = proof.text_ids(job.tokenizer, job.architecture)
    with job.tuned.open_separate() as weights:
        yield Reference(job, weights, ids, proof.read(job.architecture, weights, ids, job.tuned.lora))


def export(compared: Reference, root: Path, facts: card.Facts) -> dict[str, FormatMetrics]:
    """Write the formats of the settings below `root`, and return what the proof of each has measured.

    Args:
        compared: from `reference`: what is exported.
        root: a folder for each format is made in it; those of earlier exports are removed.
        facts: for the model cards.

    Raises:
        StageError: the model cannot be written in a format, or what was written computes something else.
        OSError: the disk is full, or a file cannot be written.
    """
    job = compared.job
    for name in FORMATS:
        shutil.rmtree(root / name, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    skipped = left_out(job)
    for name, reason in skipped.items():
        logger.warning(f"export.formats: {name} is left out: {reason}.")
    found: dict[str, FormatMetrics] = {}
    for name in (name for name in job.settings.formats if name not in skipped):
        began = time.perf_counter()
        folder = root / name
        FORMATS[name].write(folder, job, compared.weights)
        card.write_card(folder, name, job, facts)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        measured = check(name, folder, compared)
        seconds = time.perf_counter() - began
        logger.info(
            f"{name}: {megabytes(size)} in {seconds:.0f} s; read back, its logits differ by at most "
            f"{measured.largest:.1e} of {measured.range:.1f}."
        )
        found[name] = FormatMetrics(
            bytes=size,
            logit_difference=float(f"{measured.largest:.3g}"),
            logit_tolerance=float(f"{FORMATS[name].tolerance(job, measured.range):.3g}"),
            logit_range=round(measured.range, 3),
            same_choice_fraction=measured.same_choice,
            seconds=round(seconds, 2),
        )
    return found


def check(name: str, folder: Path, compared: Reference) -> proof.Difference:
    """Read a format back and compare it with the tuned model.

    Raises:
        StageError: other token ids, or logits that differ by more than the format may.
    """
    form, job = FORMATS[name], compared.job
    if form.preset:
        ids = proof.text_ids(format_of(form.preset).load_tokenizer(folder), job.architecture)
        check_ids(f"models/export/{name}", ids, compared.ids)
    with form.read(folder, job, compared.weights) as (architecture, weights):
        found = proof.read(architecture, weights, compared.ids)
        measured = proof.difference(compared.of(name), found, job.architecture.config["vocabulary_size"])
    check_difference(f"models/export/{name}", measured, form.tolerance(job, measured.range))
    return measured


def check_ids(what: str, ids: list[int], wanted: list[int]) -> None:
    """Check that a tokenizer gives the tuned model's ids.

    Raises:
        StageError: names the first place at which they differ.
    """
    if ids != wanted:
        place = next((i for i, (one, other) in enumerate(zip(ids, wanted, strict=False)) if one != other), len(ids))
        raise StageError(
            f"{what} must split a text into the tuned model's tokens: {wanted[place : place + 5]} at {place}. "
            f"Received: {ids[place : place + 5]}. Do not use it; this is a mistake of this project's."
        )


def check_difference(what: str, measured: proof.Difference, tolerance: float) -> None:
    """Check that logits differ by no more than they may; a NaN does.

    Raises:
        StageError: they do.
    """
    if not measured.largest <= tolerance:
        raise StageError(
            f"{what} must compute what the tuned model computes: logits within {tolerance:.2g} of each other. "
            f"Received: a difference of {measured.largest:.3g}, in a range of {measured.range:.3g}. Do not use it; "
            "this is a mistake of this project's."
        )
