"""One process of a rehearsal: `python -m stages.core.rehearse.worker JOB RESULT`, started by `rehearsing`.

Reads: JOB, the tiny architecture and all settings.
Writes: the first process RESULT.json (each step's loss) and RESULT.npz (the trained weights).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from stages.core import cli
from stages.core.common import code
from stages.core.config.schema import Finetune, Params
from stages.core.files import atomic_path, read_json, sha256, write_json
from stages.core.finetune import trainer
from stages.core.load import lora_kernels, weight_loading
from stages.core.load.variants import declare_model
from stages.core.presets.architecture import Architecture
from stages.core.processes import together
from stages.core.processes.group import current
from stages.core.records.layout import MeshShape
from stages.core.records.model_config import ModelConfig
from stages.core.rehearse.shrinking import RandomWeights
from stages.core.sharding.named_layouts import make_layout


def main(job_file: Path, result: Path) -> None:
    """Do this process's part."""
    with cli.ended_with_others(), cli.mistakes_in_lines(verbose=False):
        job = read_json(job_file)
        params = Params.model_validate(job["params"])
        facts = {"job": sha256(job_file), **code.digests("stages/core/rehearse/worker.py")}
        with together.joined(params.mesh.join_timeout, lambda: facts):
            losses, arrays = _train(job, params)
            if current().first:
                with atomic_path(result.with_suffix(".npz")) as temporary, temporary.open("wb") as stream:
                    np.savez(stream, **arrays)  # type: ignore[arg-type]
                write_json(result.with_suffix(".json"), losses)


def _train(job: dict[str, Any], params: Params) -> tuple[list[float], dict[str, np.ndarray]]:
    """Return each step's loss, and the trained weights."""
    architecture = Architecture(job["class_name"], job["config"])
    mesh = MeshShape(tuple(job["shape"]), device_kind="simulated")
    layout = make_layout(params.layout, architecture, mesh)
    described = ModelConfig(
        variant="baseline", preset="rehearsal", base="0" * 64, dtype=params.load.dtype, mesh=mesh, layout=layout
    )
    settings = _settings(params.finetune, job)
    model = declare_model(described, architecture, settings.lora)
    weights = weight_loading.weights_of(model.backbone)
    adapter = {
        each.path: lora_kernels.first_value(each.path, each.shape, settings.seed)
        for each in weights
        if each.kind == "lora"
    }
    base, first = RandomWeights({each.path: each.shape for each in weights}), weight_loading.ArraySource(adapter)
    source = {each.path: first if each.path in adapter else base for each in weights}
    weight_loading.fill(model.backbone, model.placements, model.mesh, lambda path: source[path])
    rows = settings.batch_size * settings.gradient_accumulation * job["steps"]
    random = np.random.default_rng(settings.seed)
    size = architecture.config["vocabulary_size"]
    sequences = {
        name: _sequences(random, count, job["length"], size) for name, count in {"train": rows, "validation": 2}.items()
    }
    result = trainer.fit(model, sequences, settings)
    return [row.loss for row in result.history.rows], trainer.trained_arrays(model)


def _settings(settings: Finetune, job: dict[str, Any]) -> Finetune:
    """Return the training settings of the rehearsal: as they are, but short and without samples and checkpoints."""
    return settings.model_copy(
        update={
            "batch_size": job["batch_size"],
            "steps": job["steps"],
            "epochs": 1,
            "sample_every": None,
            "checkpoint_every": None,
            "validate_every": None,
            "early_stopping": None,
            "warmup_steps": 0,
            "start_from": None,
        }
    )


def _sequences(random: np.random.Generator, rows: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Return random token sequences, as `tokenize` writes them."""
    tokens = random.integers(4, vocabulary, (rows, length + 1), dtype=np.int32)
    return {
        "token_ids": tokens[:, :-1],
        "target_ids": tokens[:, 1:],
        "weights": np.ones((rows, length), np.float32),
        "segment_ids": np.ones((rows, length), np.int32),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
