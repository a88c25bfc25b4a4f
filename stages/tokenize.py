"""Tokenize reviews, or pairs of prompt and response, into sequences for training; held-out ones also untruncated.

Reads: models/preset/manifest.json and the preset's vocabulary and configuration, data/imdb/train.parquet,
data/imdb/validation.parquet.
Writes: data/tokens/train.npz, data/tokens/validation.npz, data/tokens/held_out.npz, data/metrics/tokenize.json.
Command: python -m stages.tokenize
"""

from __future__ import annotations

from stages.core.cli import Run, logger, stage
from stages.core.common.paths import HELD_OUT, MANIFEST, REVIEWS, TOKENS


@stage
def main(run: Run) -> None:
    """Tokenize reviews into sequences: packed, or one truncated sequence per review."""
    from stages.core.fetch.catalog import is_base
    from stages.core.presets.formats import format_of
    from stages.core.presets.manifest import read_manifest, verified_folder
    from stages.core.presets.tokenizer import holds_vocabulary
    from stages.core.records.tokenize import TokenizeMetrics
    from stages.core.tokenize.sequences import holds_pairs, lay_out
    from stages.core.tokenize.store import write_sequences

    settings = run.params.tokenize
    sources = {split: run.paths.read(path) for split, path in REVIEWS.items()}
    manifest = read_manifest(run.paths.read(MANIFEST))
    # Not the weights: a large preset's need not be hashed to split text.
    names = [file.name for file in manifest.files]
    pairs, preset = holds_pairs(sources["train"]), format_of(manifest.format)
    needed = [name for name in names if holds_vocabulary(name) or (pairs and name == "config.json")]
    folder = verified_folder(manifest, run.paths.root, only=needed)
    tokenizer = preset.load_tokenizer(folder)
    thought = pairs and preset.read_architecture(folder).empty_thought
    metrics: dict[str, object] = {}
    if pairs and manifest.source != "path" and is_base(manifest.preset):
        logger.warning(
            f"these are pairs of prompt and response, and {manifest.preset} is a base preset, which does not "
            "know Gemma's chat template. An instruct preset learns from fewer of them."
        )
    for split, source in sources.items():
        laid_out = lay_out(source, split, tokenizer, settings, empty_thought=thought)
        write_sequences(run.paths.write(TOKENS[split]), laid_out.sequences)
        metrics[split] = laid_out.counts
        if split == "train":
            metrics["tokens_cut_by_truncation_fraction"] = laid_out.cut_by_truncation_fraction
        else:
            write_sequences(run.paths.write(HELD_OUT), laid_out.whole)
        logger.info(laid_out.summary)
    run.write_metrics("tokenize", TokenizeMetrics.model_validate(metrics))


if __name__ == "__main__":
    main()
