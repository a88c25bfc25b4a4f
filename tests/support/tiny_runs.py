"""What tests of fine-tuning share: settings with some changed, sequences with review numbers, a run in this process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from stages.core.config.reader import read_params
from stages.core.config.schema import Finetune, Layout
from stages.core.finetune import trainer
from stages.core.finetune.result import Result
from stages.core.generate import sampling
from stages.core.model.causal_lm import make_model
from tests.support.repository import ROOT
from tests.support.tiny_models import AUTO, load_tiny, sequences


def settings(**changes: Any) -> Finetune:
    """Training settings on a tiny scale, at a constant rate, without samples and checkpoints, with some changed."""
    tiny = {"rank": 2, "targets": ["query", "value"], "batch_size": 2, "learning_rate": 0.01, "schedule": "constant"}
    without = {"warmup_steps": 0, "sample_every": None, "checkpoint_every": None}
    without |= {"validate_every": None, "validate_sequences": None}
    return Finetune(**{**_default(), **tiny, **without, **changes})


@functools.cache
def _default() -> dict[str, Any]:
    return read_params(ROOT / "params.yaml").finetune.model_dump()


def data(train: int = 8, held_out: int = 4) -> dict[str, dict[str, np.ndarray]]:
    """Training sequences, each from a review of its own number (10, 11, ...), and held-out sequences."""
    reviews = np.repeat(np.arange(10, 10 + train, dtype=np.int32)[:, None], 32, axis=1)
    return {"train": {**sequences(train), "review": reviews}, "validation": sequences(held_out, seed=1)}


def train(
    preset: Path,
    wanted: Finetune,
    given: dict[str, dict[str, np.ndarray]] | None = None,
    *,
    shape: tuple[int, int] = (1, 1),
    dtype: str = "float32",
    layout: Layout = AUTO,
    **more: Any,
) -> tuple[Result, dict[str, np.ndarray]]:
    """Train a tiny preset and return what happened and the trained weights."""
    model = load_tiny(preset, shape, rank=wanted.rank, targets=tuple(wanted.targets), dtype=dtype, layout=layout)
    result = trainer.fit(model, given or data(), wanted, **more)
    return result, trainer.trained_arrays(model)


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[path].astype("f4") - other[path].astype("f4")).max()) for path in one)


def sampled(model, prompts):
    """The likeliest continuations by the model's own head and cache."""
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    return sampling.Sampler(causal)(prompts, sampling.SamplerSettings(3, (511,)))
