"""The formats of `export.formats`: how each is written, read back, and what it may differ by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from stages.core.common.errors import ParamsError
from stages.core.config.schema import Export
from stages.core.export import gguf_folder, huggingface, keras_preset, peft
from stages.core.export.gguf import in_float32
from stages.core.export.names import is_instruct, public_name
from stages.core.export.tuned import SeparateWeights, Tuned
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import WeightSource, format_of
from stages.core.presets.tokenizer import Tokenizer
from stages.core.presets.weight_table import StoredWeight
from stages.core.tokenize.chat import stops_of

TOLERANCE = 1e-3
"""Largest difference of two logits of a model and of the same weights read back: the order of sums differs."""
QUANTIZED = {"Q8_0": 0.03}
"""The same, as a fraction of the logits' range, where weights become one of 255 steps between the largest of a block
and its negative. Not a bound: twice what the embedded model has, 0.015."""
ROUNDS = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""Types that only round each number: what is written in one is compared with the tuned model rounded alike."""

Opened = AbstractContextManager[tuple[Architecture, WeightSource]]


@dataclass(frozen=True)
class Job:
    """What is exported, and how.

    Attributes:
        tuned: the variant.
        settings: the section `export`.
        chat: the model answers in turns: with the chat template, and ending where a turn does.
    """

    tuned: Tuned
    settings: Export
    chat: bool

    @property
    def architecture(self) -> Architecture:
        """The base's."""
        return self.tuned.preset.architecture

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The base's."""
        return format_of(self.tuned.preset.manifest.format).load_tokenizer(self.tuned.preset.folder)

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens that end a generation."""
        return stops_of(self.tokenizer) if self.chat else [self.tokenizer.eos]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        write: writes a folder, of the weights as they were trained.
        read: opens what was written: the architecture and the merged weights. An adapter needs the base's weights.
        numbers: returns the type of the weights by the settings.
        in_float32: returns whether a weight stays in float32 where the format rounds the others.
        preset: the format of presets whose tokenizer the folder has, None if it has none.
    """

    write: Callable[[Path, Job, SeparateWeights], None]
    read: Callable[[Path, Job, SeparateWeights], Opened]
    numbers: Callable[[Export], str]
    in_float32: Callable[[StoredWeight], bool]
    preset: str | None

    def tolerance(self, job: Job, logit_range: float) -> float:
        """Return how much two logits of the same token may differ, where the tuned model's have this range."""
        part = QUANTIZED.get(self.numbers(job.settings))
        return TOLERANCE if part is None else part * logit_range

    def rounds(self, job: Job) -> np.dtype | None:
        """Return the dtype that the weights are rounded to, None if they are not."""
        return ROUNDS.get(self.numbers(job.settings))


def no_weight(weight: StoredWeight) -> bool:
    """Return False: every weight is of the format's type."""
    return False


FORMATS = {
    "peft": Format(
        lambda folder, job, weights: peft.write_adapter(
            folder, job.tuned, job.settings.base, public_name(job.tuned.preset.manifest)
        ),
        lambda folder, job, weights: peft.read_adapter(folder, job.architecture, weights),
        numbers=lambda settings: "float32",
        in_float32=no_weight,
        preset=None,
    ),
    "huggingface": Format(
        lambda folder, job, weights: huggingface.write_folder(
            folder, job.tuned.preset, weights.merged(), job.settings.dtype, chat=job.chat, ends=job.ends
        ),
        lambda folder, job, weights: huggingface.read_folder(folder),
        numbers=lambda settings: settings.dtype,
        in_float32=no_weight,
        preset="safetensors",
    ),
    "keras": Format(
        lambda folder, job, weights: keras_preset.write_preset(
            folder, job.tuned.preset, weights.merged(), job.settings.dtype
        ),
        lambda folder, job, weights: keras_preset.read_preset(folder),
        numbers=lambda settings: settings.dtype,
        in_float32=no_weight,
        preset="keras",
    ),
    "gguf": Format(
        lambda folder, job, weights: gguf_folder.write_folder(
            folder, job.tuned, weights.merged(), job.settings.gguf_type, chat=job.chat
        ),
        lambda folder, job, weights: gguf_folder.read_folder(folder),
        numbers=lambda settings: settings.gguf_type,
        in_float32=in_float32,
        preset="gguf",
    ),
}
"""By the name in `export.formats`, which is the name of the folder too."""


def make_job(tuned: Tuned, settings: Export, chat_template: bool) -> Job:
    """Return what is to be exported, checked.

    Args:
        tuned: the variant.
        settings: the section `export`.
        chat_template: `generate.chat_template`: the user's word that the model answers in turns.

    Raises:
        ParamsError: `export.base` names a base that this model does not have.
    """
    architecture = tuned.preset.architecture
    if settings.base == "vision" and architecture.class_name != "Gemma3Backbone":
        raise ParamsError(
            "export.base must be text unless the model is a Gemma 3 of 4B or more, whose public checkpoints have a "
            f"vision tower. Received: export.base=vision, fetch.preset={tuned.preset.manifest.preset}"
        )
    return Job(tuned, settings, chat_template or is_instruct(tuned.preset.manifest))


def left_out(job: Job) -> dict[str, str]:
    """Return the formats of the settings that this variant does not have, each with the reason."""
    if job.tuned.lora.rank == 0 and "peft" in job.settings.formats:
        return {"peft": "every weight was trained (finetune.rank: 0), so there is no adapter; huggingface has them all"}
    return {}
