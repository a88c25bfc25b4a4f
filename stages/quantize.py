"""Choose the codes of a base of 4 bits on training windows; nothing to do for any other `load.dtype`.

Reads: `models/preset/manifest.json` and the preset's files, `data/tokens/train.npz`; params `load.dtype`, `quantize`.
Writes: `models/quantized/`, `data/metrics/quantize.json`.
Command: `python -m stages.quantize`. It takes no accelerator: blocks run one after the other on the host's CPU.
"""

from __future__ import annotations

import shutil
import time

from stages.core.cli import Run, logger, stage
from stages.core.common.paths import QUANTIZED_INDEX


@stage
def main(run: Run) -> None:
    """Choose the codes of an int4 base on training windows."""
    from stages.core.records.forms import four_bits_of
    from stages.core.records.quantize import QuantizedBase, QuantizeMetrics

    if not run.first:
        return
    began = time.perf_counter()
    names, count = four_bits_of(run.params.load.dtype), run.params.quantize.windows
    folder = run.paths.write(QUANTIZED_INDEX).parent
    shutil.rmtree(folder, ignore_errors=True)
    index, found = QuantizedBase(files={}, kernels=()), {}
    if names and count:
        from stages.core.load.variants import open_preset
        from stages.core.quantize.choosing import choose
        from stages.core.tokenize.store import read_sequences

        preset = open_preset(run.paths)
        windows = {name: values[:count] for name, values in read_sequences(run.paths, "train").items()}
        tokens = int((windows["segment_ids"] > 0).sum())
        logger.info(f"Choosing codes on {len(windows['token_ids'])} training windows, {tokens:,} tokens ...")
        index, errors = choose(preset, run.params.load.dtype, windows, folder)
        found = {"windows": len(windows["token_ids"]), "tokens": tokens, "matrices": len(errors)}
        for name in ("nearest", "chosen"):
            mean = sum(getattr(each, name) for each in errors.values()) / max(1, len(errors))
            found[f"output_error_{name}_fraction"] = round(mean, 6)
        logger.info(
            f"Outputs of {len(errors)} matrices: squared error {found['output_error_chosen_fraction']:.2%} of their "
            f"squares, rounded to nearest {found['output_error_nearest_fraction']:.2%}"
        )
    elif names:
        logger.info("quantize.windows is null: each weight is rounded to the nearest code while it is loaded.")
    index.write(run.paths.write(QUANTIZED_INDEX))
    run.write_metrics("quantize", QuantizeMetrics(seconds=round(time.perf_counter() - began, 3), **found))


if __name__ == "__main__":
    main()
