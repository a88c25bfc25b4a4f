"""Measure a variant of the model on whole held-out reviews: loss, perplexity and token accuracy.

Every review is read from its own BOS to its end. All three are over the tokens that are predicted, which `targets`
counts: of reviews all, of pairs the responses'.

Reads: `models/<variant>/` or the folder that `variants` names, the preset, `data/tokens/held_out.npz`, for sentiment
`data/imdb/validation.parquet`; params `evaluate` and `variants`.
Writes: `data/evaluations/<variant>.csv` (each review's loss), `data/metrics/evaluate/<variant>.json`.
Command: `python -m stages.evaluate --variant tuned`
"""

from __future__ import annotations

import functools
import sys

from stages.core.cli import Run, click, logger, stage


@stage
@click.option(
    "--variant",
    metavar="NAME",
    required=True,
    help="The model to measure: baseline, tuned, or a name in the setting variants.",
)
def main(run: Run, variant: str) -> None:
    """Measure a variant of the model on whole held-out reviews."""
    logger.info(f"Loading {variant} to measure it ...")
    from stages.core.adapters.adapted import open_variant
    from stages.core.common.paths import HELD_OUT, REVIEWS, evaluation
    from stages.core.evaluate import review_losses, sentiment, tasks
    from stages.core.evaluate.measure import measure
    from stages.core.load import variants
    from stages.core.model.causal_lm import make_model
    from stages.core.presets.formats import format_of
    from stages.core.tokenize.held_out import read_held_out

    settings = run.params.evaluate
    harness = tasks.open_harness(settings.tasks or [])
    preset = variants.open_preset(run.paths)
    model = open_variant(run.paths, variant, run.params.variants, preset)
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    causal.compile(optimizer=None, loss=None, jit_compile=True)
    measured = functools.partial(
        measure,
        lambda batches: causal.token_losses(batches, verbose=int(sys.stdout.isatty())),
        mesh=model.mesh_shape,
        max_length=settings.max_length,
        batch_tokens=settings.batch_tokens,
    )
    losses = measured(read_held_out(run.paths.read(HELD_OUT)))
    values = review_losses.metrics(variant, losses)
    if settings.tasks:
        tokenizer = format_of(preset.manifest.format).load_tokenizer(preset.folder)
        if "sentiment" in settings.tasks:
            texts, labels = sentiment.labelled(run.paths.read(REVIEWS["validation"]))
            asked = measured(sentiment.sequences(tokenizer, texts, settings.max_length))
            values = values.model_copy(update={"sentiment": sentiment.scored(asked, labels)})
        if harness:
            scores = harness(causal, tokenizer, measured, settings.max_length, settings.task_limit)
            values = values.model_copy(update={"lm_eval": scores})
    review_losses.write_losses(run.paths.write(evaluation(variant)), losses)
    run.write_metrics(f"evaluate/{variant}", values)
    logger.info(
        f"{variant}: perplexity {values.perplexity:,.2f} over {values.targets:,} tokens of {values.reviews:,} "
        f"whole held-out reviews; {values.reviews_cut:,} cut at {settings.max_length:,} tokens"
    )


if __name__ == "__main__":
    main()
