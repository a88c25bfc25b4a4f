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
from stages.core.errors import StageError

MOST_NATS = 700


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
    measured = causal.measure(batches, verbose=1 if sys.stdout.isatty() else 2)
    run.write_metrics(f"evaluate-{variant}", metrics(variant, measured["loss"], measured["accuracy"], batches.tokens))


def metrics(variant: str, loss: float, accuracy: float, tokens: int) -> dict[str, float | int]:
    """Return `data/metrics/evaluate-<variant>.json`.

    Args:
        variant: the model that was measured.
        loss: mean over the tokens, in nats.
        accuracy: share of the tokens predicted, 0.0 to 1.0.
        tokens: how many were measured.

    Raises:
        StageError: loss or perplexity is not finite.
    """
    # Beyond it exp is no float64: the model is no model of text any more.
    if not math.isfinite(loss) or loss > MOST_NATS:
        raise StageError(
            f"The held-out loss must be a number of at most {MOST_NATS} nats a token. Received: loss={loss}, "
            f"variant={variant}. Nothing was overwritten. Look at the weights that models/{variant} was made from, and "
            "at finetune.learning_rate if it was tuned."
        )
    return {
        "loss": round(loss, 5),
        "perplexity": round(math.exp(loss), 4),
        "token_accuracy": round(accuracy, 5),
        "tokens": tokens,
    }


if __name__ == "__main__":
    main()
