"""Choose the codes of an int4 base on training sequences; does nothing for any other `load.dtype`.

Reads: `models/preset/manifest.json` and the preset's files, `data/tokens/train.npz`; params `load.dtype`, `quantize`.
Writes: `models/quantized/`, `data/metrics/quantize.json`.
Command: `python -m stages.quantize`. It uses no accelerator: the blocks run one after the other on the host's CPU.
"""

from __future__ import annotations

import shutil
import time

from stages.core.cli import Run, logger, stage
from stages.core.common.paths import QUANTIZED_INDEX


@stage
def main(run: Run) -> None:
    """Choose the codes of an int4 base on training sequences."""
    from stages.core.records.forms import four_bits_of
    from stages.core.records.quantize import QuantizedBase, QuantizeMetrics

    if not run.first:
        return
    began = time.perf_counter()
    names, count = four_bits_of(run.params.load.dtype), run.params.quantize.sequences
    folder = run.paths.write(QUANTIZED_INDEX).parent
    shutil.rmtree(folder, ignore_errors=True)
    index, found = QuantizedBase(files={}, kernels=()), {}
    if names and count:
        from stages.core.load.variants import open_preset
        from stages.core.quantize.choosing import choose
        from stages.core.tokenize.store import read_sequences

        preset = open_preset(run.paths)
        sequences = {name: values[:count] for name, values in read_sequences(run.paths, "train").items()}
        tokens = int((sequences["segment_ids"] > 0).sum())
        logger.info(f"Choosing codes on {len(sequences['token_ids'])} training sequences, {tokens:,} tokens ...")
        index, errors = choose(preset, run.params.load.dtype, sequences, folder)
        found = {"sequences": len(sequences["token_ids"]), "tokens": tokens, "matrices": len(errors)}
        for name in ("nearest", "chosen"):
            mean = sum(getattr(each, name) for each in errors.values()) / max(1, len(errors))
            found[f"output_error_{name}_fraction"] = round(mean, 6)
        logger.info(
            f"Mean squared error of the outputs of {len(errors)} matrices: "
            f"{found['output_error_chosen_fraction']:.2%} of their squares; with the nearest codes "
            f"{found['output_error_nearest_fraction']:.2%}"
        )
    elif names:
        logger.info("quantize.sequences is null: load will round each weight to the nearest code.")
    index.write(run.paths.write(QUANTIZED_INDEX))
    run.write_metrics("quantize", QuantizeMetrics(seconds=round(time.perf_counter() - began, 3), **found))


if __name__ == "__main__":
    main()
