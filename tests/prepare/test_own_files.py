"""The files that people have, and what is not done to their texts."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.common.errors import ParamsError, StageError
from stages.core.prepare.cleaning import RawReview, Review, Tally, clean
from stages.core.prepare.parquet_file import write_reviews
from tests.support.prepare_runs import OWN, ROWS, WRITERS, as_jsonl, prepare, read, texts, write_jsonl


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
            r"one JSON object per line\. Received: line 2: Expecting .* column 8",
        ),
        ("mine.jsonl", b'{"text": "a"}\n["b"]\n', r"must hold JSON objects\. Received: line 2 is a list"),
        ("mine.jsonl", b'{"text": "a"}\n3\n', r"must hold JSON objects\. Received: line 2 is a text or number"),
        ("mine.jsonl", b"[" * 10**5, r"one JSON object per line\. Received: line 1: it is nested too deeply"),
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


def test_columns_that_are_not_used_are_told(tmp_path, logged):
    (tmp_path / "mine.csv").write_text("id,text,label,note\n1,a,2,b\n")
    read(tmp_path / "mine.csv", "text", "label")
    assert logged() == ["mine.csv: columns not used: id, note."]


def test_a_users_own_texts_stay_as_they_are_unless_a_setting_says_otherwise(tmp_path):
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
    monkeypatch.setattr("stages.core.prepare.sources.sample_reviews", lambda cache: iter(raw))
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
        "stages.core.prepare.sources.full_reviews",
        lambda name, folder: (RawReview(f"text {text}", 0, f"{name}:{row}") for row, text in enumerate(split[name])),
    )
    changes = {"source": "imdb_reviews", "train_file": None, "take": 4, "min_characters": 1}
    parts, tally = prepare(tmp_path, duplicates="keep", **changes)
    assert texts(parts["train"]) == ["text a", "text b", "text a", "text c"]
    assert set(texts(parts["validation"])) <= {"text x", "text y"}
    assert tally.duplicates == 2
    parts, _ = prepare(tmp_path, duplicates="drop", **changes)
    assert len(set(texts(parts["train"]))) == len(parts["train"])
