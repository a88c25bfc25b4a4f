"""Sequences: packed without loss, or one per review exactly as keras-hub's preprocessor does; and the stage."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from stages.core.files import sha256
from stages.core.presets.manifest import LICENSE
from stages.core.presets.tokenizer import KERAS_VOCABULARY, Tokenizer
from stages.core.records.manifest import Manifest, PresetFile
from stages.core.tokenize import packing, store
from tests.support import tiny_presets
from tests.support.repository import ROOT

# Some compare with keras-hub's own, which has to be imported with the devices set up.
pytestmark = pytest.mark.usefixtures("devices")

PAD, EOS, BOS = 0, 1, 2
TOKENS = st.integers(min_value=3, max_value=500)
REVIEWS = st.lists(st.lists(TOKENS, max_size=40), max_size=12)
LENGTHS = st.integers(min_value=2, max_value=33)


def segments(packed: packing.Sequences) -> list[dict[str, list]]:
    """Return the segments in reading order, each with its part of every array, from the segment ids alone."""
    found = []
    for sequence in range(len(packed["token_ids"])):
        ids = packed["segment_ids"][sequence].tolist()
        for segment, places in groupby(range(len(ids)), key=lambda place: ids[place]):
            if segment:
                cut = list(places)
                found.append(
                    {"sequence": sequence, "id": segment, **{k: v[sequence][cut].tolist() for k, v in packed.items()}}
                )
    return found


@given(REVIEWS, LENGTHS, st.sampled_from([None, EOS]))
def test_packing_makes_every_token_and_every_eos_a_target_exactly_once_in_order(reviews, length, eos):
    packed = packing.pack(reviews, length, bos=BOS, eos=eos, pad=PAD)
    ending = [] if eos is None else [eos]
    for row, review in enumerate(reviews):
        mine = (packed["review"] == row) & (packed["weights"] == 1)
        assert packed["target_ids"][mine].tolist() == [*review, *ending]
    assert packed["weights"].sum() == sum(len(review) + len(ending) for review in reviews)


@given(REVIEWS, LENGTHS, st.sampled_from([None, EOS]))
def test_a_packed_segment_starts_with_bos_holds_one_review_and_predicts_only_itself(reviews, length, eos):
    for part in segments(packing.pack(reviews, length, bos=BOS, eos=eos, pad=PAD)):
        assert part["token_ids"][0] == BOS
        assert part["token_ids"][1:] == part["target_ids"][:-1]
        assert len(set(part["review"])) == 1
        assert part["review"][0] >= 0
        assert part["positions"] == list(range(len(part["positions"])))


@given(REVIEWS, LENGTHS, st.sampled_from([None, EOS]))
def test_only_what_a_segment_repeats_of_the_one_before_is_no_target_to_train_on(reviews, length, eos):
    last = {}
    for part in segments(packing.pack(reviews, length, bos=BOS, eos=eos, pad=PAD)):
        row, targets = part["review"][0], part["target_ids"]
        if row in last:
            assert part["weights"] == [0.0] + [1.0] * (len(targets) - 1)
            assert targets[0] == last[row], "the context is the last token of the segment before"
            assert len(targets) >= 2, "a segment with nothing to train on"
        else:
            assert set(part["weights"]) == {1.0}
        last[row] = targets[-1]


@given(REVIEWS, LENGTHS, st.sampled_from([None, EOS]))
def test_segments_count_from_one_in_each_window_and_a_review_has_one_in_it(reviews, length, eos):
    packed = packing.pack(reviews, length, bos=BOS, eos=eos, pad=PAD)
    for _, parts in groupby(segments(packed), key=lambda part: part["sequence"]):
        parts = list(parts)
        assert [part["id"] for part in parts] == list(range(1, len(parts) + 1))
        rows = [part["review"][0] for part in parts]
        assert rows == sorted(set(rows))


@given(REVIEWS, LENGTHS, st.sampled_from([None, EOS]))
def test_only_the_last_packed_window_may_have_room_left_and_that_room_is_empty(reviews, length, eos):
    packed = packing.pack(reviews, length, bos=BOS, eos=eos, pad=PAD)
    filled = packed["segment_ids"].ravel() > 0
    total = int(filled.sum())
    assert filled[:total].all()
    assert filled.size - total < length
    empty = {"token_ids": PAD, "target_ids": PAD, "segment_ids": 0, "positions": 0, "review": -1}
    for name, value in empty.items():
        assert set(packed[name].ravel()[total:].tolist()) <= {value}, name


@given(REVIEWS, LENGTHS)
def test_arrays_have_the_promised_types_and_shapes(reviews, length):
    for laid_out, names in (
        (
            packing.pack(reviews, length, bos=BOS, eos=EOS, pad=PAD),
            {"token_ids", "target_ids", "weights", "segment_ids", "positions", "review"},
        ),
        (
            packing.one_per_review(reviews, length, bos=BOS, eos=EOS, pad=PAD),
            {"token_ids", "target_ids", "weights", "review"},
        ),
    ):
        assert set(laid_out) == names
        for name, array in laid_out.items():
            assert array.dtype == (np.float32 if name == "weights" else np.int32), name
            assert array.shape == (len(laid_out["weights"]), length), name


def test_packing_by_hand():
    packed = packing.pack([[11, 12, 13], [], [21, 22, 23, 24]], 6, bos=BOS, eos=EOS, pad=PAD)
    assert packed["token_ids"].tolist() == [[2, 11, 12, 13, 2, 2], [2, 21, 22, 23, 24, 0]]
    assert packed["target_ids"].tolist() == [[11, 12, 13, 1, 1, 21], [21, 22, 23, 24, 1, 0]]
    assert packed["weights"].tolist() == [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]]
    assert packed["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 3], [1, 1, 1, 1, 1, 0]]
    assert packed["positions"].tolist() == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0]]
    assert packed["review"].tolist() == [[0, 0, 0, 0, 1, 2], [2, 2, 2, 2, 2, -1]]
    counts = packing.sequence_metrics(packed, [[11, 12, 13], [], [21, 22, 23, 24]], eos=True)
    assert (counts["tokens_kept"], counts["tokens_repeated"], counts["positions_padded"]) == (10, 1, 1)


def test_a_review_that_is_cut_ends_with_eos_only_where_that_is_asked_for():
    reviews, form = [[11, 12, 13, 14], [21, 22, 23], [31, 32]], {"bos": BOS, "eos": EOS, "pad": PAD}
    cut = packing.one_per_review(reviews, 3, **form)
    assert cut["token_ids"].tolist() == [[2, 11, 12], [2, 21, 22], [2, 31, 32]]
    assert cut["target_ids"].tolist() == [[11, 12, 13], [21, 22, 23], [31, 32, 1]]
    ended = packing.one_per_review(reviews, 3, **form, eos_after_cut=True)
    assert ended["token_ids"].tolist() == cut["token_ids"].tolist()
    assert ended["target_ids"].tolist() == [[11, 12, 1], [21, 22, 1], [31, 32, 1]]
    assert packing.sequence_metrics(ended, reviews, eos=True) == packing.sequence_metrics(cut, reviews, eos=True)


@given(REVIEWS, st.integers(min_value=2, max_value=33), st.booleans())
def test_the_counts_add_up_and_truncation_is_counted_as_it_happens(reviews, length, eos):
    for lay_out in (packing.pack, packing.one_per_review):
        laid_out = lay_out(reviews, length, bos=BOS, eos=EOS if eos else None, pad=PAD)
        counts = packing.sequence_metrics(laid_out, reviews, eos=eos)
        total = sum(map(len, reviews)) + len(reviews) * eos
        assert counts["tokens_kept"] + counts["tokens_cut"] == total
        places = counts["tokens_kept"] + counts["tokens_repeated"] + counts["positions_padded"]
        assert places == counts["sequences"] * length
        pieces = len(segments(laid_out)) if lay_out is packing.pack else 0
        filled = sum(len(review) + eos > 0 for review in reviews)
        assert counts["tokens_repeated"] == max(pieces - filled, 0), "one for each piece that goes on"
        assert counts["tokens_cut"] >= 0
        if lay_out is packing.pack:
            assert counts["tokens_cut"] == 0
        else:
            fraction = packing.cut_by_truncation_fraction(reviews, length, eos=eos)
            assert fraction == pytest.approx(counts["tokens_cut"] / total if total else 0.0, abs=1e-6)


# --- Beside keras-hub ---


@pytest.mark.parametrize("family", ["gemma", "gemma3"])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("length", [8, 32, 200])
def test_one_window_a_review_is_what_keras_hub_s_preprocessor_makes(family, eos, length):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras_hub

    proto, texts = tiny_presets.tiny_proto(), [*tiny_presets.tiny_reviews(20), "", "a"]
    if family == "gemma3":
        tokenizer = keras_hub.models.Gemma3Tokenizer(proto, has_vision_tokens=False)
        preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(tokenizer, sequence_length=length, add_end_token=eos)
        # It learns responses only, so the review is one; it takes no plain strings.
        x, y, weights = preprocessor({"prompts": [""] * len(texts), "responses": texts})
    else:
        preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(
            keras_hub.models.GemmaTokenizer(proto), sequence_length=length, add_end_token=eos
        )
        x, y, weights = preprocessor(texts)
    ours = Tokenizer.from_proto(proto)
    laid_out = packing.one_per_review(
        ours.encode_all(texts),
        length,
        bos=ours.bos,
        eos=ours.eos if eos else None,
        pad=ours.pad,
        eos_after_cut=True,
    )
    assert np.array_equal(laid_out["token_ids"], np.array(x["token_ids"]))
    assert np.array_equal(laid_out["target_ids"], np.array(y))
    assert np.array_equal(laid_out["weights"], np.array(weights).astype("float32"))
    assert np.array_equal(laid_out["review"] >= 0, np.array(x["padding_mask"]).astype(bool))
    assert all(set(line.tolist()) <= {row, -1} for row, line in enumerate(laid_out["review"]))


# --- The file ---


def test_the_same_windows_give_the_same_bytes_whenever_they_are_written(tmp_path):
    packed = packing.pack([[5, 6, 7]] * 9, 8, bos=BOS, eos=EOS, pad=PAD)
    store.write_sequences(tmp_path / "first.npz", packed)
    time.sleep(2.1)  # a ZIP entry's date has steps of two seconds
    store.write_sequences(tmp_path / "second.npz", packed)
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "first.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        # Compressed bytes would depend on the machine's zlib, which no test on one machine can tell.
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    read = np.load(tmp_path / "first.npz")
    assert set(read) == set(packed)
    for name, array in packed.items():
        assert np.array_equal(read[name], array)
        assert read[name].dtype == array.dtype


# --- The stage ---


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project folder as fetch and prepare leave it: settings, a tiny preset's manifest, two Parquet files."""
    root = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "params.yaml", root)
    vocabulary = root / "preset" / KERAS_VOCABULARY
    vocabulary.parent.mkdir(parents=True)
    vocabulary.write_bytes(tiny_presets.tiny_proto())
    # Weights that are not there: the stage must not want them.
    files = (
        PresetFile(KERAS_VOCABULARY, vocabulary.stat().st_size, sha256(vocabulary)),
        PresetFile("model.weights.h5", 10**12, "0" * 64),
    )
    (root / "models/preset").mkdir(parents=True)
    manifest = Manifest(
        preset="tiny",
        source="path",
        format="keras",
        handle=None,
        folder="preset",
        license=LICENSE,
        files=files,
    )
    manifest.write(root / "models/preset/manifest.json")
    (root / "data/imdb").mkdir(parents=True)
    for split, count in (("train", 30), ("validation", 7)):
        texts = tiny_presets.tiny_reviews(count)
        table = pyarrow.table({"text": texts, "label": [0] * count, "id": [str(number) for number in range(count)]})
        parquet.write_table(table, root / f"data/imdb/{split}.parquet")
    return root


def run_stage(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the stage in a project folder; it fails when TensorFlow, Keras or JAX was imported on the way."""
    program = (
        "import sys\nfrom stages.tokenize import main\n"
        "code = main(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'tensorflow', 'keras', 'jax'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code or 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )


def test_the_stage_packs_both_splits_and_counts_them(project, tmp_path):
    done = run_stage(project, "--out-root", str(tmp_path), "--set", "tokenize.length=64")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "data/metrics/tokenize.json").read_text())
    tokenizer = Tokenizer.from_proto(tiny_presets.tiny_proto())
    for split, count in (("train", 30), ("validation", 7)):
        reviews = tokenizer.encode_all(tiny_presets.tiny_reviews(count))
        expected = packing.pack(reviews, 64, bos=BOS, eos=EOS, pad=PAD)
        read = np.load(tmp_path / f"data/tokens/{split}.npz")
        assert set(read) == set(expected)
        assert all(np.array_equal(read[name], expected[name]) for name in expected)
        counts = packing.sequence_metrics(expected, reviews, eos=True)
        assert metrics[split] == counts | {"control_tokens_spelled": 0}
        # A small split has few sequences to make up for the room left in the last one.
        assert metrics[split]["positions_padded"] < 64
        assert re.search(
            rf"^{split}: {count} reviews in {len(expected['weights'])} sequences", done.stderr, re.MULTILINE
        )
    # Of 64 positions per sequence at most one repeats a token, and only the last sequence has room left.
    assert metrics["train"]["filled_fraction"] >= 1 - 2 / 64
    assert 0 < metrics["tokens_cut_by_truncation_fraction"] < 1


def test_the_stage_without_packing_keeps_one_window_a_review(project, tmp_path):
    done = run_stage(
        project, "--out-root", str(tmp_path), "--set", "tokenize.length=64", "--set", "tokenize.packing=false"
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "data/metrics/tokenize.json").read_text())
    read = np.load(tmp_path / "data/tokens/train.npz")
    assert set(read) == {"token_ids", "target_ids", "weights", "review"}
    assert read["token_ids"].shape == (30, 64)
    train = metrics["train"]
    lost = train["tokens_cut"] / (train["tokens_cut"] + train["tokens_kept"])
    assert metrics["tokens_cut_by_truncation_fraction"] == pytest.approx(lost, abs=1e-6)


def test_the_held_out_reviews_are_written_whole_whatever_length_and_packing_are(project, tmp_path):
    variants = {"default": [], "short": ["tokenize.length=8"], "cut": ["tokenize.length=16", "tokenize.packing=false"]}
    for name, changes in variants.items():
        arguments = [part for setting in changes for part in ("--set", setting)]
        assert run_stage(project, "--out-root", str(tmp_path / name), *arguments).returncode == 0
    written = {name: (tmp_path / name / "data/tokens/held_out.npz").read_bytes() for name in variants}
    assert written["default"] == written["short"] == written["cut"]
    read = np.load(tmp_path / "cut/data/tokens/held_out.npz")
    reviews = Tokenizer.from_proto(tiny_presets.tiny_proto()).encode_all(tiny_presets.tiny_reviews(7))
    assert read["token_ids"].tolist() == [token for review in reviews for token in (BOS, *review, EOS)]
    assert np.array_equal(read["is_target"], read["token_ids"] != BOS)
    assert read["offsets"].tolist() == [0, *np.cumsum([len(review) + 2 for review in reviews])]


@pytest.mark.parametrize("eos", ["end", "always", "never"])
def test_the_setting_says_which_reviews_of_the_stage_end_with_eos(eos, project, tmp_path):
    settings = ("tokenize.length=64", "tokenize.packing=false", f"tokenize.eos={eos}")
    done = run_stage(project, "--out-root", str(tmp_path), *(part for each in settings for part in ("--set", each)))
    assert done.returncode == 0, done.stderr
    read = np.load(tmp_path / "data/tokens/train.npz")
    ended = [
        bool((targets[weights == 1] == EOS).any())
        for targets, weights in zip(read["target_ids"], read["weights"], strict=True)
    ]
    reviews = Tokenizer.from_proto(tiny_presets.tiny_proto()).encode_all(tiny_presets.tiny_reviews(30))
    whole = [len(review) + 1 <= 64 for review in reviews]
    assert 0 < sum(whole) < 30, "some are cut and some are not"
    assert ended == {"end": whole, "always": [True] * 30, "never": [False] * 30}[eos]


def test_two_runs_of_the_stage_write_the_same_bytes(project, tmp_path):
    for name in ("first", "second"):
        assert run_stage(project, "--out-root", str(tmp_path / name)).returncode == 0
    for path in (
        *(f"data/tokens/{name}.npz" for name in ("train", "validation", "held_out")),
        "data/metrics/tokenize.json",
    ):
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes()


def test_a_changed_vocabulary_stops_the_stage_before_it_writes(project, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(project, root)
    proto = bytearray(tiny_presets.tiny_proto())
    proto[-1] ^= 1  # the same size, so that only the hash can tell
    (root / "preset" / KERAS_VOCABULARY).write_bytes(proto)
    done = run_stage(root)
    assert done.returncode == 1
    assert "vocabulary.spm is not the file that the manifest names" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (root / "data/tokens").exists()


def test_a_missing_split_is_named_with_the_stage_that_makes_it(project, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(project, root)
    (root / "data/imdb/validation.parquet").unlink()
    done = run_stage(root)
    assert done.returncode == 1
    assert "data/imdb/validation.parquet does not exist" in done.stderr
    assert "stages.prepare" in done.stderr or "stages.fetch" in done.stderr


settings.register_profile("sequences", deadline=None)
settings.load_profile("sequences")
