"""Our forward pass against keras-hub's own, sharded and not, for every family."""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
import keras
import numpy as np
import pytest

from stages.core.model import decoder, kv_cache, tied_table
from stages.core.model.causal_lm import make_model
from tests.support.repository import FAMILIES
from tests.support.tiny_models import AUTO, keras_hub_reads, load_tiny, sequences

LENGTH = 32
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def keras_hub_says(presets: dict[str, Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Hidden states and logits of keras-hub's own model, loaded by keras-hub."""
    ids = sequences(4, LENGTH)["token_ids"]
    return {family: tuple(map(np.asarray, keras_hub_reads(folder)(ids))) for family, folder in presets.items()}


def forward(model, batch):
    """Run the model's own forward pass and return hidden states and per-token losses."""
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    variables = model.backbone.variables

    def run(values, batch):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            table = model.backbone.token_embedding._embeddings.value
            hidden = decoder.hidden_states(
                model.backbone,
                tied_table.embed(table, batch["token_ids"], causal.head_plan),
                batch["segment_ids"],
                constrain=causal.constrain,
            )
        return hidden

    return np.asarray(jax.jit(run)([variable.value for variable in variables], batch))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_keras_hubs_on_every_mesh(keras_hub_says, presets, family, shape):
    batch = sequences(4, LENGTH)
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    model = load_tiny(presets[family], shape)
    np.testing.assert_allclose(forward(model, batch), keras_hub_says[family][0], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tutorials_layout_gives_the_same_hidden_states(keras_hub_says, presets, family):
    if family in ("gemma3", "gemma4"):
        pytest.skip("one key/value head cannot be split by the tutorial's rules: the layout engine refuses it")
    batch = sequences(4, LENGTH)
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    tutorial = AUTO.model_copy(update={"name": "tutorial"})
    model = load_tiny(presets[family], (2, 2), layout=tutorial)
    np.testing.assert_allclose(forward(model, batch), keras_hub_says[family][0], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_review_does_not_see_the_one_before_it(presets, family):
    model = load_tiny(presets[family], (1, 1))
    batch = sequences(2, LENGTH)
    together = forward(model, batch)
    half = LENGTH // 2
    for segment in (slice(0, half), slice(half, LENGTH)):
        alone = {name: values[:, segment] for name, values in batch.items()}
        alone["segment_ids"] = np.ones_like(alone["segment_ids"])
        np.testing.assert_allclose(together[:, segment], forward(model, alone), **TOLERANCE)


def test_the_test_of_packing_can_fail(presets):
    model = load_tiny(presets["gemma3"], (1, 1))
    batch = sequences(2, LENGTH)
    apart = forward(model, batch)
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    assert np.abs(forward(model, batch) - apart)[:, LENGTH // 2 :].max() > 0.01


@pytest.mark.parametrize(("family", "shape"), list(itertools.product(FAMILIES, [(1, 1), (2, 4)])))
@pytest.mark.parametrize("width", [5, 13], ids=["shorter than the window", "longer"])
def test_one_token_at_a_time_with_a_cache_gives_the_same_hidden_states(presets, family, shape, width):
    """Rows of which one is padded; windows of 8, which no cache is longer than."""
    model = load_tiny(presets[family], shape)
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    batch = sequences(2, LENGTH)
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    whole, ids = forward(model, batch), batch["token_ids"]
    variables = model.backbone.variables
    padding = np.array([0, 3], np.int32)

    def embedded(ids):
        return tied_table.embed(model.backbone.token_embedding._embeddings.value, ids, causal.head_plan)

    @jax.jit
    def begin(values, ids):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return decoder.read_prompts(
                model.backbone, embedded(ids), width - padding, LENGTH, constrain=causal.constrain
            )

    @jax.jit
    def step(values, ids, place, caches):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            hidden, news = decoder.read_token(
                model.backbone, embedded(ids), place, padding, caches, constrain=causal.constrain
            )
            return hidden, [kv_cache.added(cache, *new, place) for cache, new in zip(caches, news, strict=True)]

    values = [variable.value for variable in variables]
    rows = [
        np.concatenate([np.zeros(pad, np.int32), row[: LENGTH - pad]]) for pad, row in zip(padding, ids, strict=True)
    ]
    rows = np.stack(rows)
    hidden, caches = begin(values, rows[:, :width])
    windows = [layer.attention.use_sliding_window_attention for layer in model.backbone.transformer_layers]
    assert [cache[0].shape[2] for cache in caches] == [8 if window else LENGTH for window in windows]
    for place in range(width, LENGTH + 1):
        expected = np.stack([whole[row, place - 1 - pad] for row, pad in enumerate(padding)])
        np.testing.assert_allclose(np.asarray(hidden), expected, **TOLERANCE)
        if place < LENGTH:
            hidden, caches = step(values, rows[:, place : place + 1], np.int32(place), caches)


def test_queries_of_the_27b_models_are_scaled_by_their_own_rule(presets, devices):
    """keras-hub ignores query_head_dim_normalize=False; the original checkpoints do not."""
    model = load_tiny(presets["gemma2"], (1, 1))
    batch = sequences(2, LENGTH)
    usual = forward(model, batch)
    # hidden_dim / heads is 16 here as head_dim is, so take another head count's share.
    model.backbone.query_head_dim_normalize = False
    model.backbone.hidden_dim, kept = 4 * model.backbone.hidden_dim, model.backbone.hidden_dim
    try:
        scaled = forward(model, batch)
    finally:
        model.backbone.hidden_dim = kept
    assert np.abs(scaled - usual).max() > 1e-3
