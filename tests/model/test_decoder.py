"""Our forward pass against keras-hub's own, sharded and not, for every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.passes import decoding_of, hidden_states
from tests.support.repository import FAMILIES
from tests.support.tiny_models import AUTO, keras_hub_reads, load_tiny, sequences

LENGTH = 32
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def keras_hub_says(presets: dict[str, Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Hidden states and logits of keras-hub's own model, loaded by keras-hub."""
    ids = sequences(4, LENGTH)["token_ids"]
    return {family: tuple(map(np.asarray, keras_hub_reads(folder)(ids))) for family, folder in presets.items()}


# Those of other meshes are in the losses and gradients that test_causal_lm.py compares.
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_keras_hubs_on_every_mesh(keras_hub_says, presets, family, shape):
    batch = sequences(4, LENGTH)
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    model = load_tiny(presets[family], shape)
    np.testing.assert_allclose(hidden_states(model, batch), keras_hub_says[family][0], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tutorials_layout_gives_the_same_hidden_states(keras_hub_says, presets, family):
    if family in ("gemma3", "gemma4"):
        pytest.skip("one key/value head cannot be split by the tutorial's rules: the layout engine refuses it")
    batch = sequences(4, LENGTH)
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    tutorial = AUTO.model_copy(update={"name": "tutorial"})
    model = load_tiny(presets[family], (2, 2), layout=tutorial)
    np.testing.assert_allclose(hidden_states(model, batch), keras_hub_says[family][0], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_review_does_not_see_the_one_before_it(presets, family):
    model = load_tiny(presets[family], (1, 1))
    batch = sequences(2, LENGTH)
    together = hidden_states(model, batch)
    half = LENGTH // 2
    for segment in (slice(0, half), slice(half, LENGTH)):
        alone = {name: values[:, segment] for name, values in batch.items()}
        alone["segment_ids"] = np.ones_like(alone["segment_ids"])
        np.testing.assert_allclose(together[:, segment], hidden_states(model, alone), **TOLERANCE)


def test_the_test_of_packing_can_fail(presets):
    model = load_tiny(presets["gemma3"], (1, 1))
    batch = sequences(2, LENGTH)
    apart = hidden_states(model, batch)
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    assert np.abs(hidden_states(model, batch) - apart)[:, LENGTH // 2 :].max() > 0.01


# Of families, meshes and widths (shorter than the window, longer) each pair.
@pytest.mark.parametrize(
    ("family", "shape", "width"),
    [
        (family, shape, (5, 13)[(row + column) % 2])
        for row, family in enumerate(FAMILIES)
        for column, shape in enumerate([(1, 1), (2, 4)])
    ],
    ids=str,
)
def test_one_token_at_a_time_with_a_cache_gives_the_same_hidden_states(presets, family, shape, width):
    """Rows of which one is padded; windows of 8, which no cache is longer than."""
    model = load_tiny(presets[family], shape)
    batch = sequences(2, LENGTH)
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    whole, ids = hidden_states(model, batch), batch["token_ids"]
    padding = np.array([0, 3], np.int32)
    rows = [
        np.concatenate([np.zeros(pad, np.int32), row[: LENGTH - pad]]) for pad, row in zip(padding, ids, strict=True)
    ]
    windows = [layer.attention.use_sliding_window_attention for layer in model.backbone.transformer_layers]
    for place, (hidden, caches) in enumerate(decoding_of(model, padding, width)(np.stack(rows)), width):
        assert [cache[0].shape[2] for cache in caches] == [8 if window else LENGTH for window in windows]
        expected = np.stack([whole[row, place - 1 - pad] for row, pad in enumerate(padding)])
        np.testing.assert_allclose(hidden, expected, **TOLERANCE)
    assert place == LENGTH


def test_queries_of_the_27b_models_are_scaled_by_their_own_rule(presets, devices):
    """keras-hub ignores query_head_dim_normalize=False; the original checkpoints do not."""
    model = load_tiny(presets["gemma2"], (1, 1))
    batch = sequences(2, LENGTH)
    usual = hidden_states(model, batch)
    # hidden_dim / heads is 16 here as head_dim is, so take another head count's share.
    model.backbone.query_head_dim_normalize = False
    model.backbone.hidden_dim, kept = 4 * model.backbone.hidden_dim, model.backbone.hidden_dim
    try:
        scaled = hidden_states(model, batch)
    finally:
        model.backbone.hidden_dim = kept
    assert np.abs(scaled - usual).max() > 1e-3
