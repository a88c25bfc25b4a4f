"""Turn reviews into windows of tokens.

Reads: models/preset/manifest.json and the preset's vocabulary, data/imdb/train.parquet, data/imdb/validation.parquet.
Writes: data/tokens/train.npz, data/tokens/validation.npz, data/metrics/tokenize.json.
Command: python -m stages.tokenize
"""

from __future__ import annotations

from stages.core.cli import Run, stage
from stages.core.errors import StageError
from stages.core.paths import MANIFEST, REVIEWS, TOKENS


@stage
def main(run: Run) -> None:
    """Turn reviews into windows of tokens: packed, or cut to one a review."""
    from pyarrow import parquet

    from stages.core import windows
    from stages.core.presets import read_manifest, verified_folder
    from stages.core.tokenizer import holds_vocabulary, load_tokenizer

    settings = run.params.tokenize
    sources = {split: run.paths.read(path) for split, path in REVIEWS.items()}
    manifest = read_manifest(run.paths.read(MANIFEST))
    # Only the vocabulary: a large preset's weights need not be hashed to split text.
    vocabulary = [file.name for file in manifest.files if holds_vocabulary(file.name)]
    tokenizer = load_tokenizer(verified_folder(manifest, run.paths.root, only=vocabulary), manifest.format)
    eos = tokenizer.eos if settings.eos else None
    lay_out = windows.pack if settings.packing else windows.one_per_review

    metrics: dict[str, object] = {}
    for split, source in sources.items():
        reviews = tokenizer.encode_all(parquet.read_table(source, columns=["text"])["text"].to_pylist())
        laid_out = lay_out(reviews, settings.length, bos=tokenizer.bos, eos=eos, pad=tokenizer.pad)
        counts = windows.window_metrics(laid_out, reviews, eos=settings.eos)
        if not counts["tokens_kept"]:
            raise StageError(
                f"The {split} reviews must have at least one token. Received: {len(reviews)} reviews, none"
            )
        windows.write_windows(run.paths.write(TOKENS[split]), laid_out)
        metrics[split] = counts
        if split == "train":
            metrics["tokens_cut_by_truncation_fraction"] = windows.cut_by_truncation_fraction(
                reviews, settings.length, eos=settings.eos
            )
        run.say(
            f"{split}: {counts['reviews']:,} reviews in {counts['windows']:,} windows of {settings.length} tokens, "
            f"{counts['filled_fraction']:.1%} filled, {counts['tokens_cut']:,} tokens cut"
        )
    run.write_metrics("tokenize", metrics)


if __name__ == "__main__":
    main()
