"""Fine-tune with LoRA, or every weight with rank 0, by Keras' `fit` on the sharded model.

Reads: `models/baseline/model.json` and the preset, `data/tokens/*.npz`; params `finetune` and `generate.turns` (for
samples). Where it was stopped before it goes on from its newest checkpoint, in the cache folder.
Writes: `models/tuned/`, `data/sharding/tuned.json`, `data/plots/finetune.csv`, `data/plots/samples.jsonl`,
`data/metrics/finetune.json`.
Command: `python -m stages.finetune`
"""

from __future__ import annotations

import time
from pathlib import Path

from stages.core.cli import Run, click, stage


@stage
@click.option(
    "--profile",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a JAX profile of a few steps below this folder, for TensorBoard or Perfetto.",
)
def main(run: Run, profile: Path | None) -> None:
    """Fine-tune the sharded model."""
    from stages.core.common.paths import CURVE, SAMPLES, SHARDING
    from stages.core.files import write_json
    from stages.core.finetune import trainer
    from stages.core.generate import prompting
    from stages.core.load import adapter, variants
    from stages.core.presets.formats import format_of
    from stages.core.sharding import table
    from stages.core.sharding.layout import Fallback

    began = time.perf_counter()
    settings, turns = run.params.finetune, run.params.generate.turns
    preset = variants.open_preset(run.paths)
    tokenizer = format_of(preset.manifest.format).load_tokenizer(preset.folder)
    description = {**variants.read_description(run.paths, "baseline"), "variant": "tuned", "tuned": None}
    model = trainer.load_trainable(preset, description, settings)
    # Keras chooses its backend when it is first imported, so what builds on it comes after the devices are set up.
    from stages.core.finetune.curve import write_curve, write_samples
    from stages.core.finetune.optimizer import optimizer_placements
    from stages.core.plan.run_check import run_of, warn_before_running
    from stages.core.tokenize.store import read_sequences

    sequences = {split: read_sequences(run.paths, split) for split in ("train", "validation")}
    warn_before_running(run.paths.root, run_of(description, settings, sequences["train"]["token_ids"].shape[1]))
    prompting.warn_of_another_format(tokenizer, sequences["train"], turns=turns)
    store = trainer.checkpoints(run.paths, description, model.platform, settings)
    result = trainer.fit(
        model,
        sequences,
        settings,
        store=store,
        tokenizer=tokenizer,
        turns=turns,
        profile=profile,
        load_seconds=time.perf_counter() - began,
    )

    tuned = trainer.describe(settings)
    base = {"base": preset.fingerprint, "preset": preset.manifest.preset}
    adapter.save(run.paths.write(f"models/tuned/{tuned['file']}"), trainer.trained_arrays(model), {**base, **tuned})
    write_json(run.paths.write("models/tuned/model.json"), {**description, "tuned": tuned})
    placements = [*model.placements, *optimizer_placements(model, result.optimizer)]
    report = table.report(
        placements,
        model.mesh_shape,
        [Fallback(**fallback) for fallback in description["layout"]["fallbacks"]],
        preset=preset.manifest.preset,
        layout=description["layout"]["name"],
        dtype=description["dtype"],
        platform=model.platform,
        trainable_parameters=result.trainable_parameters,
    )
    write_json(run.paths.write(SHARDING["tuned"]), report)
    write_curve(run.paths.write(CURVE), result.history.rows)
    write_samples(run.paths.write(SAMPLES), result.history.samples)
    run.write_metrics("finetune", result.metrics())
    if store:
        store.clear()


if __name__ == "__main__":
    main()
