"""Continue the prompts with a variant of the model: before tuning (baseline) or after (tuned).

Reads: `models/<variant>/`, the preset; params `generate`.
Writes: `data/generated/<variant>.jsonl`, `data/metrics/generate-<variant>.json`.
Command: `python -m stages.generate --variant tuned`
"""

from __future__ import annotations

import time

from stages.core.cli import Run, click, logger, stage


@stage
@click.option("--variant", type=click.Choice(["baseline", "tuned"]), required=True, help="The model to prompt.")
def main(run: Run, variant: str) -> None:
    """Continue the prompts with a variant of the model."""
    from stages.core.common import paths
    from stages.core.generate import prompting, sampling
    from stages.core.load import variants
    from stages.core.model.causal_lm import make_model
    from stages.core.presets.formats import format_of
    from stages.core.records.generate import GenerateMetrics, Generation

    settings = run.params.generate
    preset = variants.open_preset(run.paths)
    tokenizer = format_of(preset.manifest.format).load_tokenizer(preset.folder)
    model = variants.load_variant(run.paths, variant, preset)
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    prompts, stops = prompting.encode(tokenizer, settings.prompts, chat_template=settings.chat_template)
    pieces = tokenizer.vocabulary_size
    sampler = sampling.SamplerSettings(settings.max_tokens, settings.temperature, settings.top_k, stops, pieces)
    logger.info(f"Generating up to {settings.max_tokens} tokens for each of {len(prompts)} prompts with {variant} ...")
    began = time.perf_counter()
    continued = sampling.generate(causal, prompts, sampler, settings.seed)
    seconds = time.perf_counter() - began

    found = [
        Generation(prompt=prompt, text=tokenizer.decode(tokens))
        for prompt, tokens in zip(settings.prompts, continued, strict=True)
    ]
    for each in found:
        click.echo(f"{each.prompt}{each.text}\n")
    Generation.write_lines(run.paths.write(paths.generated(variant)), found)
    count = sum(len(tokens) for tokens in continued)
    run.write_metrics(
        f"generate-{variant}",
        GenerateMetrics(prompts=len(prompts), tokens=count, tokens_per_second=round(count / seconds, 2)),
    )


if __name__ == "__main__":
    main()
