"""Fine-tuning against the same runs done by hand in PyTorch with transformers' Gemma: losses and final weights.

The reference is `tests/data/reference_training.npz`. `python -m tests.data.record_training` records it again, in an
environment made from requirements-benchmarks.txt: needed when tests/support/training_cases.py changes, and only then.

Both sides compute in float32 and add in other orders. Measured: losses differ by at most 4e-7 of themselves, weights by
at most 5e-5 of the largest change within their tensor; the tolerances leave room for other processors. Faults put into
one side (a mean of the batches' means, epsilon inside the bias correction, norms decayed, no decay, no clipping, pieces
that see each other, prompts trained on, another scale of LoRA, a schedule one step late, another order) each move a
weight by more than 1e-1 of that change wherever they act.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from stages.core.finetune import trainer
from stages.core.load import lora_kernels
from stages.core.load.variants import Preset
from stages.core.presets.formats import format_of
from stages.core.presets.manifest import LICENSE
from stages.core.records.manifest import Manifest
from tests.support.hf_folder import tensors_of
from tests.support.tiny_models import describe
from tests.support.tiny_runs import settings
from tests.support.training_cases import CASES, CONFIGS, RECORDED, first_adapter, first_weights, sequences

LOSS = 3e-6
"""Largest difference of a loss, relative to it."""
WEIGHTS = 2e-4
"""Largest difference of a weight, relative to the largest change of one within its tensor."""


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def folders(devices, tmp_path_factory):
    """The first weights of each family as a Hugging Face folder."""
    base = tmp_path_factory.mktemp("reference")
    for family, config in CONFIGS.items():
        (base / family).mkdir()
        (base / family / "config.json").write_text(json.dumps(config))
        save_file(first_weights(family), base / family / "model.safetensors")
    return base


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_one_done_by_hand(name, folders, recorded, monkeypatch):
    case = CASES[name]
    wanted, adapter, folder = settings(**case.settings), first_adapter(case), folders / case.family
    monkeypatch.setattr(lora_kernels, "first_value", lambda path, *_: adapter[path])
    # The folder is not fetched: it needs no tokenizer, and so has none.
    manifest = Manifest(
        preset=case.family,
        source="path",
        format="safetensors",
        handle=None,
        folder=str(folder),
        license=LICENSE,
        files=(),
    )
    preset = Preset(manifest, folder, format_of(manifest.format).read_architecture(folder))
    model = trainer.load_trainable(preset, describe(preset, case.mesh), wanted)
    rows = trainer.fit(model, sequences(case), wanted).history.rows
    trained, first = trainer.trained_arrays(model), adapter
    if wanted.rank == 0:
        trained, first = tensors_of(case.family, trained), first_weights(case.family)

    def expect(column: str, key: str, tolerance: float) -> None:
        values = [getattr(row, column) for row in rows if getattr(row, column) is not None]
        np.testing.assert_allclose(values, recorded[f"{name}/{key}"], rtol=tolerance, err_msg=key)

    expect("tokens", "targets", 0)
    expect("learning_rate", "learning_rates", 1e-6)
    expect("loss", "losses", LOSS)
    expect("validation_loss", "validation_losses", LOSS)
    prefix = f"{name}/trained/"
    assert {f"{prefix}{path}" for path in trained} == {key for key in recorded if key.startswith(prefix)}
    for path, value in trained.items():
        final = recorded[f"{prefix}{path}"]
        change = np.abs(final - first[path]).max()
        np.testing.assert_allclose(value, final, rtol=0, atol=WEIGHTS * change, err_msg=path)
