"""What tests of prepare share: settings with some changed, files in each form, and the stage as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.config.schema import Prepare
from stages.core.prepare.own_files import Columns, file_reviews
from stages.core.prepare.sources import prepare_reviews
from tests.support import warm
from tests.support.repository import ROOT

TFDS = ROOT.parent / "shared" / "tfds"
DEFAULTS = {
    "source": "files",
    "validation": 2,
    "take": None,
    "shuffle": False,
    "seed": 0,
    "html_breaks": "newline",
    "min_characters": 3,
    "duplicates": "drop",
    "data_dir": None,
    "train_file": "reviews.jsonl",
    "validation_file": None,
    "format": "columns",
    "text_column": "text",
    "prompt_column": None,
    "response_column": None,
    "label_column": None,
}


def prepare(folder, **changes):
    return prepare_reviews(Prepare.model_validate(DEFAULTS | changes), folder, folder / "cache")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, text="text", label=None, prompt=None):
    return file_reviews([path], "prepare.train_file", Columns(text, label, prompt))


def texts(reviews):
    return [review.text for review in reviews]


def run_stage(out, *overrides, **environment):
    """Run the stage as a user does."""
    command = [warm.python(), "-m", "stages.prepare", "--out-root", out]
    for override in overrides:
        command += ["--set", f"prepare.{override}"]
    environment = os.environ | {key: str(value) for key, value in environment.items()}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


ROWS = [("a text, with a comma", 1), ('a "quoted" text\nof two lines', 0), ("NA", 1), ("naïve 日本", 0)]


def as_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("review", "stars"), *rows])


def as_jsonl(path, rows):
    write_jsonl(path, [{"review": text, "stars": label} for text, label in rows])


def as_parquet(path, rows):
    pq.write_table(pa.table({"review": [text for text, _ in rows], "stars": [label for _, label in rows]}), path)


WRITERS = {".csv": as_csv, ".jsonl": as_jsonl, ".parquet": as_parquet}


OWN = {"html_breaks": "auto", "min_characters": None}
