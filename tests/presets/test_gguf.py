"""Gemma 3 from GGUF: a tiny file written here, and the embedded 270M against what Hugging Face makes of that file."""

from __future__ import annotations

import functools
import json
import os
import tracemalloc

import keras
import numpy as np
import pytest
import sentencepiece

from stages.core.common.errors import StageError
from stages.core.presets.formats import format_of
from stages.core.presets.gguf import GgufWeights
from stages.core.presets.gguf_architecture import read_architecture
from stages.core.presets.gguf_tokenizer import tokenizer_proto
from tests.support import tiny_presets
from tests.support.gguf_file import numpy_of, write_gguf
from tests.support.repository import DATA

# Some compare with keras-hub's own, which has to be imported with the devices set up.
pytestmark = pytest.mark.usefixtures("devices")


@functools.cache
def reference() -> dict:
    return json.loads((DATA / "reference_gemma3_270m.json").read_text())


@pytest.fixture(scope="module")
def tiny_backbone():
    """A tiny Gemma 3 with a global layer (the sixth) and two key/value heads."""
    return tiny_presets.tiny_backbone("gemma3", num_layers=6, num_key_value_heads=2)


def test_the_architecture_has_the_arguments_the_backbone_was_built_with(tmp_path, tiny_backbone):
    architecture = read_architecture(write_gguf(tmp_path / "tiny.gguf", tiny_backbone, "F32").parent)
    built_with = tiny_backbone.get_config()
    assert architecture.class_name == "Gemma3Backbone"
    assert architecture.config == {name: built_with[name] for name in architecture.config}
    left_out = set(built_with) - set(architecture.config)
    assert left_out == {
        "name",
        "trainable",
        "dtype",
        "use_bidirectional_attention",
        "is_embedding_model",
        "pooling_intermediate_dim",
        "embedding_dim",
    }


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("F32", 1e-6), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q5_0", 0.1)]
)
def test_weights_come_back_under_keras_paths_and_in_keras_shapes(tmp_path, tiny_backbone, kind, tolerance):
    weights = GgufWeights(write_gguf(tmp_path / "tiny.gguf", tiny_backbone, kind))
    assert weights.paths() == [weight.path for weight in tiny_backbone.weights]
    for weight in tiny_backbone.weights:
        expected = numpy_of(weight)
        values = weights.read(weight.path)
        assert values.dtype == np.float32
        assert values.flags.c_contiguous
        assert values.shape == weights.shape(weight.path) == expected.shape
        assert np.abs(values - expected).max() <= tolerance * np.abs(expected).max(), weight.path


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_part_of_the_leading_axis_reads_like_the_cut_whole(tmp_path, tiny_backbone, kind):
    weights = GgufWeights(write_gguf(tmp_path / "tiny.gguf", tiny_backbone, kind))
    for path in weights.paths():
        whole = weights.read(path)
        size = len(whole)
        for rows in (slice(0, size // 2), slice(size // 3, size), slice(size - 1, None), slice(0, 0), slice(None)):
            assert np.array_equal(weights.read(path, rows), whole[rows]), (path, rows)


def test_a_slice_with_a_step_is_refused(tmp_path, tiny_backbone):
    weights = GgufWeights(write_gguf(tmp_path / "tiny.gguf", tiny_backbone, "F32"))
    with pytest.raises(ValueError, match="step 1"):
        weights.read("token_embedding/embeddings", slice(0, 10, 2))


def test_the_tokenizer_gives_the_ids_of_the_proto_it_was_made_from(tmp_path, tiny_backbone):
    proto = tokenizer_proto(write_gguf(tmp_path / "tiny.gguf", tiny_backbone, "F32"))
    ours = sentencepiece.SentencePieceProcessor(model_proto=proto)
    original = sentencepiece.SentencePieceProcessor(model_proto=tiny_presets.tiny_proto())
    for text in [*tiny_presets.tiny_reviews(20), "", "  two  spaces ", "\n\n\n", "\N{POPCORN} é <start_of_turn>"]:
        assert ours.encode(text) == original.encode(text)
    # The file says "control" of it, as llama.cpp's converter does.
    assert ours.unk_id() == ours.piece_to_id("no such piece") == 3
    assert proto == tokenizer_proto(tmp_path / "tiny.gguf")


def test_a_file_that_is_cut_short_is_a_users_error_not_a_traceback(tmp_path, tiny_backbone):
    whole = write_gguf(tmp_path / "tiny.gguf", tiny_backbone, "F32").read_bytes()
    for size in (0, 3, 20, 200, 5000, len(whole) - 100):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(StageError, match=r"complete GGUF file(.|\n)*python -m stages.fetch"):
            GgufWeights(cut)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({"architecture": "llama"}, "general.architecture='llama'"), ({"rope": 1.0e4}, "rope.freq_base=10000")],
)
def test_a_model_that_keras_hub_cannot_express_is_refused(tmp_path, tiny_backbone, metadata, message):
    path = write_gguf(tmp_path / "other.gguf", tiny_backbone, "F32", metadata=metadata)
    with pytest.raises(StageError, match=message):
        read_architecture(path.parent)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path, tiny_backbone):
    path = write_gguf(tmp_path / "other.gguf", tiny_backbone, "F32", metadata={"tokenizer": "gpt2"})
    with pytest.raises(StageError, match=r"tokenizer\.ggml\.model='gpt2'"):
        tokenizer_proto(path)


def test_a_missing_tensor_is_named(tmp_path, tiny_backbone):
    path = write_gguf(tmp_path / "part.gguf", tiny_backbone, "F32", without="blk.3.ffn_up.weight")
    with pytest.raises(StageError, match=r"blk.3.ffn_up.weight \(for decoder_block_3/ffw_gating_2/kernel\)"):
        GgufWeights(path)


def test_the_folder_needs_its_one_file_which_is_held_against_its_own_architecture(tmp_path, tiny_backbone):
    write_gguf(tmp_path / "whole.gguf", tiny_backbone, "F32")
    gguf = format_of("gguf")
    assert gguf.needed_files(tmp_path) == ["whole.gguf"]
    gguf.check_weights(tmp_path, gguf.read_architecture(tmp_path))
    (tmp_path / "whole.gguf").unlink()
    write_gguf(tmp_path / "part.gguf", tiny_backbone, "F32", without="blk.3.ffn_up.weight")
    with pytest.raises(StageError, match=r"blk\.3\.ffn_up\.weight"):
        gguf.check_weights(tmp_path, gguf.read_architecture(tmp_path))


# --- The embedded model ---


def test_the_embedded_tokenizer_gives_hugging_face_s_ids(real_gguf):
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_proto(real_gguf))
    assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.unk_id()) == (0, 1, 2, 3)
    for entry in [*reference()["texts"], {**reference()["first_review"], "first": True}]:
        ids = tokenizer.encode(entry["text"])
        if entry.get("first"):
            ids = [tokenizer.bos_id(), *ids][: len(entry["token_ids"])]
        assert ids == entry["token_ids"], entry["text"]


def test_reading_a_weight_takes_the_memory_of_that_weight_alone(real_gguf):
    weights = GgufWeights(real_gguf)
    tracemalloc.start()
    try:
        size = weights.read("token_embedding/embeddings").nbytes
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        part = weights.read("token_embedding/embeddings", slice(0, 262_144 // 8)).nbytes
        part_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 262_144 * 640 * 4
    slack = 100 * os.cpu_count() * 2**20  # the pieces that the threads are at
    assert peak < size + min(slack, size // 4)
    assert part * 8 == size
    assert part_peak < part + min(slack, size // 4)


@pytest.fixture(scope="module")
def embedded_backbone(real_gguf):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras_hub

    backbone = keras_hub.models.Gemma3Backbone(**read_architecture(real_gguf.parent).config, dtype="float32")
    weights = GgufWeights(real_gguf)
    assert weights.paths() == [weight.path for weight in backbone.weights]
    for weight in backbone.weights:
        weight.assign(weights.read(weight.path))
    return backbone


def logits_of(backbone, token_ids: np.ndarray, lengths: np.ndarray):
    """Return (batch, length, vocabulary) logits."""
    mask = np.arange(token_ids.shape[1])[None] < lengths[:, None]
    hidden = backbone({"token_ids": token_ids, "padding_mask": mask.astype("int32")})
    return keras.ops.convert_to_numpy(backbone.token_embedding(hidden, reverse=True))


def log_likelihoods(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the log-probability of each target; `logits` has one more axis than `targets`, the vocabulary."""
    peak = logits.max(-1, keepdims=True)
    normalizers = np.log(np.exp(logits - peak).sum(-1, dtype=np.float64)) + peak[..., 0]
    return np.take_along_axis(logits, targets[..., None], -1)[..., 0] - normalizers


def test_the_embedded_model_gives_hugging_face_s_logits(embedded_backbone):
    expected = reference()["first_review"]
    token_ids = np.array([expected["token_ids"]], np.int32)
    logits = logits_of(embedded_backbone, token_ids, np.array([token_ids.shape[1]]))[0]
    assert logits.argmax(-1).tolist() == expected["argmax"]
    for entry in expected["positions"]:
        at = logits[entry["position"]]
        assert np.abs(at[entry["top_ids"]] - entry["top_logits"]).max() < 1e-3
        assert np.abs(at[expected["columns"]] - entry["column_logits"]).max() < 1e-3
    loss = -log_likelihoods(logits[:-1], token_ids[0, 1:]).mean()
    assert abs(loss - expected["loss"]) < 1e-5
