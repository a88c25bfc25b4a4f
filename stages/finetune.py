"""Fine-tune with LoRA, or every weight with rank 0, by Keras' `fit` on the sharded model.

Reads: `models/baseline/model.json` and the preset, `data/tokens/*.npz`, the folder of `finetune.start_from`; params
`finetune` and `generate.chat_template` (for samples). A stopped run resumes from its newest checkpoint (cache folder).
Writes: `models/tuned/`, `data/{sharding/tuned,metrics/finetune}.json`, `data/plots/{finetune.csv,samples.jsonl}`.
Command: `python -m stages.finetune`
"""

from __future__ import annotations

import time
from pathlib import Path

from stages.core.cli import Run, click, logger, stage


@stage
@click.option(
    "--profile",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a JAX profile of a few steps below this folder, for TensorBoard or Perfetto.",
)
def main(run: Run, profile: Path | None) -> None:
    """Fine-tune the sharded model."""
    logger.info("Loading the model to fine-tune ...")
    from stages.core.adapters import start
    from stages.core.common import inputs
    from stages.core.common.paths import CURVE, SAMPLES, SHARDING
    from stages.core.finetune import trainer
    from stages.core.finetune.optimizer import optimizer_placements
    from stages.core.generate import prompting
    from stages.core.load import adapter, variants
    from stages.core.presets.formats import format_of
    from stages.core.preview.run_check import run_of, tell_beside_plan, warn_before_running
    from stages.core.records.finetune import Sample, live_curve, write_curve
    from stages.core.sharding import table
    from stages.core.tokenize.store import read_sequences

    began = time.perf_counter()
    settings, chat_template = run.params.finetune, run.params.generate.chat_template
    preset = variants.open_preset(run.paths)
    tokenizer = format_of(preset.manifest.format).load_tokenizer(preset.folder)
    config = variants.read_config(run.paths, "baseline")
    start_from = start.start_folder(run.paths, settings.start_from)
    model = trainer.load_trainable(preset, config, settings, start_from, variants.codes_of(run.paths, config))
    if run.first:
        inputs.declare(run.paths, "finetune", "start_from", start_from)
    sequences = {split: read_sequences(run.paths, split) for split in ("train", "validation")}
    this_run = run_of(config, settings, sequences["train"]["token_ids"].shape[1])
    warn_before_running(run.paths.root, this_run)
    prompting.warn_of_another_format(tokenizer, sequences["train"], chat_template=chat_template)
    store = trainer.checkpoints(run.paths, config, model.platform, settings, start_from)
    result = trainer.fit(
        model,
        sequences,
        settings,
        store=store,
        tokenizer=tokenizer,
        chat_template=chat_template,
        show_curve=live_curve(run.paths.write(CURVE)) if run.first else None,
        profile=profile,
        load_seconds=time.perf_counter() - began,
    )
    trained = trainer.trained_arrays(model)
    if not run.first:
        return
    tuned = trainer.describe(settings.lora)
    about = {"base": config.base, "preset": config.preset, **tuned.model_dump()}
    adapter.save(run.paths.write(f"models/tuned/{tuned.file}"), trained, about)
    config.model_copy(update={"variant": "tuned", "tuned": tuned}).write(run.paths.write("models/tuned/model.json"))
    report = table.report(
        [*model.placements, *optimizer_placements(model, result.optimizer)],
        model.mesh_shape,
        preset=config.preset,
        layout=config.layout,
        dtype=config.dtype,
        trainable_parameters=result.trainable_parameters,
    )
    report.write(run.paths.write(SHARDING["tuned"]))
    write_curve(run.paths.write(CURVE), result.history.rows)
    Sample.write_lines(run.paths.write(SAMPLES), result.history.samples)
    run.write_metrics("finetune", result.metrics())
    tell_beside_plan(run.paths.root, this_run, result.metrics())
    if store:
        store.clear()


if __name__ == "__main__":
    main()
