"""Whatever file is drawn is read as Python's csv and json read it, or stops with its place: nothing in between."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import random
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stages.core.common.errors import ParamsError
from stages.core.prepare.own_files import Columns, file_reviews
from stages.core.prepare.tables import read_table

# Half a surrogate and NUL are refused; csv's own marks, line ends and separators of other kinds come often.
CHARACTERS = st.one_of(
    st.sampled_from(list("ab \",;\t'\\{}\r\n\ufeff\u2028\x85\x0b\x0c\x1c")),
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
)
TEXT = st.text(CHARACTERS, max_size=12)
FILES = settings(deadline=None, max_examples=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


def read(path, content: bytes, columns=("text", "label")):
    path.write_bytes(content)
    return [row.values for row in read_table(path, columns).rows]


@FILES
@given(
    rows=st.lists(st.tuples(TEXT, TEXT), max_size=6),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    compressed=st.booleans(),
)
def test_what_csv_writes_is_read_as_it_was(folder, rows, delimiter, end, quoting, encoding, compressed):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n" if end == "\n" else "\r\n", quoting=quoting)
    writer.writerows([("text", "label"), *rows])
    content = stream.getvalue()
    if end == "\r" and "\n" not in "".join(map("".join, rows)):
        content = content.replace("\r\n", "\r")
    # csv's writer leaves a CR bare where lines end in LF; at the end of a line it can only be taken for part of that.
    if end == "\n" and any(label.endswith("\r") for _, label in rows):
        rows = [(text, label.removesuffix("\r") if f"{label}\n" in content else label) for text, label in rows]
    data = content.encode(encoding)
    name = ("mine.tsv" if delimiter == "\t" else "mine.csv") + (".gz" if compressed else "")
    assert read(folder / name, gzip.compress(data) if compressed else data) == rows


@FILES
@given(body=st.text(st.sampled_from('ab",\n \\'), max_size=30), end=st.sampled_from(["\n", "\r\n"]))
@example('a"b,"c"\n', "\n")
@example('"a""b",c', "\n")
@example('"He said \\"fine\\"",1', "\n")
@example('a,1\n"open,1\nb,2\n"c" d,1', "\n")
def test_any_text_is_read_as_csv_reads_it_in_strict_mode_or_refused(folder, body, end):
    content = ("text,label\n" + body).replace("\n", end)
    try:
        expected = list(csv.reader(io.StringIO(content, newline=""), strict=True))[1:]
    except csv.Error:
        expected = None
    blank = [not row or (len(row) == 1 and not row[0].strip()) for row in expected or []]
    if expected is None or any(len(row) != 2 and not empty for row, empty in zip(expected, blank, strict=True)):
        with pytest.raises(ParamsError, match=r"in line \d+"):
            read(folder / "mine.csv", content.encode())
    else:
        rows = [(None, None) if empty else tuple(row) for row, empty in zip(expected, blank, strict=True)]
        assert read(folder / "mine.csv", content.encode()) == rows


NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXT, inner, max_size=2)),
    max_leaves=3,
)


def as_text(value):
    """What the one rule for all formats makes of a value; None of what it refuses."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


@FILES
@given(
    objects=st.lists(st.dictionaries(st.sampled_from(["text", "label", "other"]), VALUES), max_size=5),
    ascii_only=st.booleans(),
    suffix=st.sampled_from([".jsonl", ".json"]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    indent=st.sampled_from([None, 1]),
)
def test_what_json_writes_is_read_as_json_reads_it_or_refused(folder, objects, ascii_only, suffix, end, indent):
    objects = [{"text": "first", "label": None}, *objects]
    if suffix == ".jsonl":
        content = end.join(json.dumps(each, ensure_ascii=ascii_only) for each in objects)
    else:
        content = json.dumps(objects, ensure_ascii=ascii_only, indent=indent).replace("\n", end)
    path = folder / f"mine{suffix}"
    path.write_bytes(content.encode())
    values = [[each.get(name) for name in ("text", "label")] for each in objects]
    if any(isinstance(value, list | dict) for pair in values for value in pair):
        with pytest.raises(
            ParamsError, match=r"Received: (a list|an object) in (line|row) \d+ of .*, column (text|label)"
        ):
            reviews(path)
        return
    assert [review.text for review in reviews(path)] == [as_text(text) for text, _ in values]
    labels = [label if label is None or label.strip() else None for label in (as_text(label) for _, label in values)]
    assert [None if each is None else str(each) for each in (review.label for review in reviews(path))] == [
        label if label is None or not all_whole(labels) else str(int(float(label))) for label in labels
    ]


def all_whole(labels) -> bool:
    """Whether labels are taken for whole numbers."""
    known = [label.removesuffix(".0") for label in labels if label is not None]
    return all(
        each.removeprefix("-").isascii()
        and each.removeprefix("-").isdigit()
        and str(int(each)) == each
        and abs(int(each)) < 2**53
        for each in known
    ) or not any(known)


def reviews(path):
    return file_reviews([path], "prepare.train_file", Columns("text", "label"))


ARROW = st.sampled_from(
    [
        (pa.string(), TEXT, str),
        (pa.large_string(), TEXT, str),
        (pa.dictionary(pa.int32(), pa.string()), TEXT, str),
        (pa.int64(), st.integers(-(2**63), 2**63 - 1), str),
        (pa.uint8(), st.integers(0, 255), str),
        (pa.float64(), st.floats(), lambda number: None if number != number else str(float(number))),
        (pa.float32(), st.floats(width=32), lambda number: None if number != number else str(np.float32(number))),
        (pa.bool_(), st.booleans(), lambda value: str(value).lower()),
        (pa.decimal128(6, 2), st.decimals(-99, 99, places=2), str),
    ]
)


@FILES
@given(data=st.data(), kind=ARROW)
def test_what_parquet_holds_is_read_as_texts(folder, data, kind):
    arrow, values, spelled = kind
    column = data.draw(st.lists(st.one_of(st.none(), values), max_size=6))
    path = folder / "mine.parquet"
    pq.write_table(pa.table({"text": pa.array(column, arrow), "label": pa.nulls(len(column), pa.string())}), path)
    expected = [None if value is None else spelled(value) for value in column]
    assert [review.text for review in reviews(path)] == expected


@FILES
@given(lines=st.lists(st.text(CHARACTERS.filter(lambda each: each not in "\r\n"), max_size=12), max_size=6))
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_text_file_is_its_lines(folder, end, lines):
    # A mark at the very beginning is the file's.
    content = codecs.BOM_UTF8 + "".join(line + end for line in lines).encode()
    assert read(folder / "mine.txt", content, ()) == [(line,) for line in lines]


def test_a_lone_carriage_return_is_text_where_lines_end_otherwise(folder):
    rows = [(f"Film {i} begins here\rand goes on\r\rafter it", str(i)) for i in range(6)]
    content = pd.DataFrame(rows, columns=["text", "label"]).to_csv(index=False)
    assert content.count("\r") == 18 and '"' not in content, "pandas leaves it bare"
    assert read(folder / "mine.csv", content.encode()) == rows
    assert read(folder / "mine.txt", b"one\rtwo\nthree\r\n", ()) == [("one\rtwo",), ("three",)]


def test_every_format_has_the_same_rule_for_numbers_and_booleans(folder):
    frame = pd.DataFrame({"text": [21, 3, 2**62], "label": [True, False, True]})
    frame.to_csv(folder / "mine.csv", index=False)
    frame.to_json(folder / "mine.jsonl", orient="records", lines=True)
    frame.to_json(folder / "mine.json", orient="records")
    frame.to_parquet(folder / "mine.parquet")
    for suffix in (".csv", ".jsonl", ".json", ".parquet"):
        found = reviews(folder / f"mine{suffix}")
        assert [review.text for review in found] == ["21", "3", str(2**62)], suffix
        assert [str(review.label).lower() for review in found] == ["true", "false", "true"], suffix


@pytest.mark.parametrize(
    "column, kind",
    [
        (pa.array([b"a"], pa.binary()), "binary data"),
        (pa.array([["a"]]), "a list"),
        (pa.array([{"a": 1}]), "an object"),
        (pa.array([0], pa.timestamp("s")), "a datetime"),
    ],
)
def test_a_parquet_column_of_no_text_is_named(folder, column, kind):
    pq.write_table(pa.table({"text": column, "label": [1]}), folder / "mine.parquet")
    with pytest.raises(ParamsError, match=rf"Received: {kind} in row 0 of .*mine\.parquet, column text"):
        reviews(folder / "mine.parquet")


def test_a_damaged_parquet_file_is_refused_wherever_it_is_damaged(folder):
    table = pa.table({"text": [f"text {row} of some length" for row in range(200)], "label": list(range(200))})
    pq.write_table(table, folder / "whole.parquet", write_page_checksum=True)
    whole, path, draw = (folder / "whole.parquet").read_bytes(), folder / "mine.parquet", random.Random(0)
    expected = [review.text for review in reviews(folder / "whole.parquet")]
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged if draw.random() < 0.8 else damaged[: draw.randrange(len(damaged))])
        try:
            assert [review.text for review in reviews(path)] == expected, "a page's checksum was not compared"
        except ParamsError:
            refused += 1
    assert refused > 200


def test_a_partition_in_the_folders_name_adds_no_column(tmp_path):
    (tmp_path / "label=7").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "label=7" / "mine.parquet")
    with pytest.raises(ParamsError, match=r"label_column must be a column of mine\.parquet: text\."):
        reviews(tmp_path / "label=7" / "mine.parquet")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (gzip.compress(b'{"text": "a"}', mtime=0), r"gzip data, whose name ends in \.gz"),
        (bz2.compress(b"a"), "bzip2 data"),
        (lzma.compress(b"a"), "xz data"),
        (b"PK\x03\x04...", r"a ZIP archive \(or a spreadsheet\)"),
        (b"\x28\xb5\x2f\xfd...", "Zstandard data"),
    ],
    ids=["gzip", "bzip2", "xz", "zip", "zstd"],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_another_kind_of_file_under_a_text_files_name_is_said_to_be_what_it_is(folder, suffix, content, kind):
    (folder / f"mine{suffix}").write_bytes(content)
    with pytest.raises(ParamsError, match=rf"mine\{suffix} must be text, as its name says\. Received: {kind}$"):
        reviews(folder / f"mine{suffix}")


def test_a_parquet_file_under_a_text_files_name_is_said_to_be_one(folder):
    pq.write_table(pa.table({"text": ["a"]}), folder / "mine.csv")
    with pytest.raises(ParamsError, match=r"Received: Parquet data, whose name ends in \.parquet$"):
        reviews(folder / "mine.csv")


def test_a_decimal_keeps_its_digits(folder):
    pq.write_table(pa.table({"text": [Decimal("1.50")], "label": [None]}), folder / "mine.parquet")
    assert [review.text for review in reviews(folder / "mine.parquet")] == ["1.50"]
