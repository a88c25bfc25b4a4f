"""Measure a variant of the model on the held-out windows: loss, perplexity and token accuracy.

All three are over the tokens that would be learnt, which `tokens` counts: of reviews all, of pairs the responses'.

Reads: `models/<variant>/`, the preset, `data/tokens/validation.npz`; params `evaluate`.
Writes: `data/metrics/evaluate-<variant>.json`.
Command: `python -m stages.evaluate --variant tuned`
"""

from __future__ import annotations

import math
import sys

from stages.core.cli import Run, click, stage


@stage
@click.option("--variant", type=click.Choice(["baseline", "tuned"]), required=True, help="The model to measure.")
def main(run: Run, variant: str) -> None:
    """Measure a variant of the model on held-out reviews."""
    from stages.core import variants

    preset = variants.open_preset(run.paths)
    model = variants.load_variant(run.paths, variant, preset, variants.read_description(run.paths, variant))
    from stages.core.batches import Batches, read_windows
    from stages.core.causal import make_model, pin_to_mesh

    windows = read_windows(run.paths, "validation")
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    causal.compile(optimizer=None, loss=None, jit_compile=True)
    pin_to_mesh(causal, model.jax_mesh)
    batches = Batches(windows, run.params.evaluate.batch_size, model.mesh_shape)
    measured = causal.evaluate(batches, return_dict=True, verbose=1 if sys.stdout.isatty() else 2)
    run.write_metrics(
        f"evaluate-{variant}",
        {
            "loss": round(measured["loss"], 5),
            "perplexity": round(math.exp(measured["loss"]), 4),
            "token_accuracy": round(measured["accuracy"], 5),
            "tokens": int((windows["weights"] > 0).sum()),
        },
    )


if __name__ == "__main__":
    main()
