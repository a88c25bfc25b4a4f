"""Gemma 4's text models in the shape of E2B on meshes, decoded, and over int8 codes.

The last blocks attend to keys and values of earlier ones, with wider feed-forward layers, and every block adds numbers
of each token's own (embeddings for each layer). test_gemma4.py compares it, and E4B, with the readers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.core.records.layout import LoraConfig
from tests.support.codes import numbers_of
from tests.support.passes import decoding_of, hidden_states, loss_and_gradients
from tests.support.tiny_models import AUTO, load_tiny, sequences
from tests.support.tiny_presets import EDGE, write_tiny_preset
from tests.support.tiny_runs import sampled

EVERY = ("attention/.*", "ffw_.*", "per_layer_.*")
LENGTH, READ_AT_ONCE, RANK = 48, 13, 2
ALIKE = {"rtol": 1e-3, "atol": 1e-4}
"""Of gradients, relative to the largest of a weight."""


@pytest.fixture(scope="module")
def small(devices, tmp_path_factory) -> Path:
    """The shape of E2B, whose one key/value head no mesh divides."""
    return write_tiny_preset(tmp_path_factory.mktemp("small"), "gemma4", **EDGE["E2B"])


def assert_alike(one: tuple[float, dict], other: tuple[float, dict]) -> None:
    """Losses and gradients are the same but for rounding."""
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for path, wanted in other[1].items():
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(one[1][path] / largest, wanted / largest, **ALIKE, err_msg=path)


@pytest.mark.parametrize(
    ("shape", "rank", "over_batch"), [((1, 4), RANK, "none"), ((2, 2), 0, "weights")], ids=["LoRA", "in full"]
)
def test_on_a_mesh_loss_and_gradients_are_those_of_one_device_also_rematerialized(small, shape, rank, over_batch):
    rows, layout = sequences(4, LENGTH), AUTO.model_copy(update={"shard_over_batch": over_batch})
    alone = loss_and_gradients(load_tiny(small, (1, 1), rank=rank, targets=EVERY), rows)
    model = load_tiny(small, shape, rank=rank, targets=EVERY, layout=layout)
    assert all(each.splits("model") for each in model.placements if each.weight.path.endswith(("kernel", "embeddings")))
    assert_alike(loss_and_gradients(model, rows, rematerialize=True), alone)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=str)
def test_decoded_token_by_token_hidden_states_are_those_of_the_whole_and_only_blocks_with_keys_have_caches(
    small, shape
):
    model, rows = load_tiny(small, shape), sequences(2, LENGTH)
    rows["segment_ids"] = np.ones_like(rows["segment_ids"])
    whole = hidden_states(model, rows)
    read = decoding_of(model, np.zeros(2, np.int32), READ_AT_ONCE)
    for place, (hidden, caches) in enumerate(read(rows["token_ids"]), READ_AT_ONCE):
        assert [cache[0].shape[2] for cache in caches] == [8, LENGTH]
        np.testing.assert_allclose(hidden, whole[:, place - 1], rtol=1e-4, atol=1e-4)
    assert place == LENGTH


def test_text_is_the_same_on_a_mesh(small):
    prompts = [[2, 10, 11, 12], [2, *range(100, 113)]]
    texts = [sampled(load_tiny(small, shape, rank=RANK, targets=EVERY), prompts) for shape in ((1, 1), (1, 4))]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", ["int8_table_float32", "int4_float32"])
def test_over_codes_loss_and_gradients_are_those_of_the_numbers_that_the_codes_stand_for(small, dtype):
    codes = load_tiny(small, (1, 2), rank=RANK, targets=EVERY, dtype=dtype)
    kept = {each.weight.path for each in codes.placements if each.weight.dtype == "int8"}
    assert {"token_embedding/embeddings", "per_layer_token_embedding/embeddings"} < kept
    assert "decoder_block_3/per_layer_up_proj/kernel" in kept
    floats = numbers_of(codes, small, LoraConfig(RANK, 2.0 * RANK, EVERY))
    rows = sequences(2, LENGTH)
    assert_alike(loss_and_gradients(codes, rows), loss_and_gradients(floats, rows))
