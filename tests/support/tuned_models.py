"""A tiny tuned model twice: on a mesh with its adapter beside the weights, and on disk as the exporters open it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stages.core.export.tuned import TrainedWeights, Tuned
from stages.core.finetune.trainer import trained_arrays
from stages.core.load import adapter
from stages.core.load.variants import LoadedModel
from stages.core.model import decoder, layer_embeddings, tied_table
from stages.core.model.causal_lm import make_model
from stages.core.records.layout import LoraConfig
from stages.core.records.model_config import TunedWeights
from tests.support.tiny_models import describe, load_tiny, open_tiny
from tests.support.tiny_presets import EDGE, EXPERTS

ALL_LAYERS = ("attention/.*", "ffw_.*")
EVERY_KIND: dict[str, dict] = {
    "gemma": {},
    "gemma2": {"num_layers": 4},
    "gemma3": {"num_layers": 6, "num_key_value_heads": 2, "global_rope_scaling_factor": 8.0},
    "gemma4": {"num_layers": 4},
}
"""Backbone arguments of each family with all kinds of blocks: of six of Gemma 3's one is global."""
MODELS: dict[str, tuple[str, dict]] = {
    **{family: (family, arguments) for family, arguments in EVERY_KIND.items()},
    "experts": ("gemma4", EXPERTS),
    **{size: ("gemma4", arguments) for size, arguments in EDGE.items()},
}
"""Family and backbone arguments of a model of every family, and of the sizes of Gemma 4 that differ in kind."""


def tuned(preset_folder: Path, folder: Path, targets: tuple[str, ...] = ALL_LAYERS) -> tuple[LoadedModel, Tuned]:
    """A tiny preset with a random adapter of rank 3 and alpha 6."""
    model = load_tiny(preset_folder, (1, 1), rank=3, targets=targets)
    preset = open_tiny(preset_folder)
    weights = TunedWeights(file="adapter.safetensors", rank=3, alpha=6.0, targets=targets)
    config = describe(preset, (1, 1)).model_copy(update={"variant": "tuned", "tuned": weights})
    path = folder / weights.file
    adapter.save(path, trained_arrays(model), {"base": preset.fingerprint, "preset": "tiny"})
    return model, Tuned(preset, config, TrainedWeights(path), LoraConfig(3, 6.0, targets))


def logits(model: LoadedModel, ids: list[int]) -> np.ndarray:
    """The logits after each token, (tokens, vocabulary) float32, by the pipeline's own forward pass."""
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    plan, table = causal.head_plan, causal.table.value

    @jax.jit
    def forward(tokens: jax.Array) -> jax.Array:
        embedded = tied_table.embed(table, tokens, plan, model.backbone.token_embedding.compute_dtype)
        rows = layer_embeddings.look_up(model.backbone, tokens, plan)
        hidden = decoder.hidden_states(model.backbone, embedded, jnp.ones_like(tokens), layer_rows=rows)
        return tied_table.logits(hidden[0], tied_table.padded(table, plan), table.shape[0], plan)

    return np.asarray(forward(jnp.array([ids], jnp.int32)))
