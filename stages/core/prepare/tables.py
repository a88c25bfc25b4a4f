"""Rows of a file, unchanged: CSV and TSV, JSON Lines, a JSON array, Parquet, or text with one row per line.

Purpose: one rule for all formats. A value is a text, None, or what only some formats have (a boolean, a list, an
object); a number is its text as the file spells it. Nothing is guessed or repaired: malformed content is an error with
its place.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from stages.core.common.errors import ParamsError, shown
from stages.core.prepare.text_files import decode, format_of, lines_of, plain_lines, read_bytes

FIELD_LIMIT = 2**31 - 1  # characters; csv's own limit is 131,072, and a C long has 32 bits on some platforms

TWICE = object()
"""The value of a key that a JSON object has twice."""


class Row(NamedTuple):
    """A row: where it begins ("line 3", or "row 2" from 0 where a format has no lines), and the values asked for."""

    place: str
    values: tuple[Any, ...]


class Table(NamedTuple):
    """The names of a file's columns, none for a text file; and its rows, if it has all columns asked for."""

    columns: list[str]
    rows: list[Row]


def read_table(path: Path, wanted: Sequence[str]) -> Table:
    """Read some columns of a file; its suffix names the format, `.gz` after it that it is compressed.

    An empty line is a row without values. Text is UTF-8, or what a byte order mark says; its lines end in LF or CRLF,
    or in CR where that is the only line end (in CSV: the header's).

    Args:
        path: the file.
        wanted: names of columns, in the order of the rows' values. A value that a row lacks is None. A text file's
            only value is the line, whatever is wanted.

    Raises:
        ParamsError: another format, or content that is malformed, with its place.
        StageError: the file cannot be read.
    """
    reader = READERS.get(format_of(path))
    if reader is None:
        raise ParamsError(
            f"A data file's name must end in one of {', '.join(READERS)}, or that and .gz. Received: {shown(path)}"
        )
    return reader(path, read_bytes(path), wanted)


def _text_lines(path: Path, data: bytes, wanted: Sequence[str]) -> Table:
    """Read a text file, which has no columns."""
    lines = enumerate(plain_lines(decode(path, data)), start=1)
    return Table([], [Row(f"line {number}", (line,)) for number, line in lines])


def _csv(path: Path, data: bytes, wanted: Sequence[str], delimiters: str = ",;\t") -> Table:
    """Read a CSV file with a header, by the first of the delimiters with which the header has the columns wanted."""
    text = decode(path, data)
    columns: list[str] = []
    malformed: ParamsError | None = None
    limit = csv.field_size_limit(FIELD_LIMIT)
    try:
        for delimiter in delimiters:
            records = _records(path, text, delimiter)
            try:
                header = next((fields for _, fields in records if fields), [])
            except ParamsError as error:
                malformed = malformed or error
                continue
            if set(wanted) <= set(header):
                return Table(header, list(_rows(path, header, records, wanted)))
            columns = columns or header
    finally:
        csv.field_size_limit(limit)
    if malformed and not columns:
        raise malformed
    return Table(columns, [])


def _tsv(path: Path, data: bytes, wanted: Sequence[str]) -> Table:
    """Read a CSV file whose delimiter is the tab."""
    return _csv(path, data, wanted, "\t")


def _rows(
    path: Path, header: list[str], records: Iterable[tuple[str, list[str]]], wanted: Sequence[str]
) -> Iterator[Row]:
    """Yield the rows below a CSV header; each must have as many fields as it."""
    _check_once(path, header, wanted)
    places = [header.index(name) for name in wanted]
    for place, fields in records:
        if not fields or (len(fields) == 1 < len(header) and not fields[0].strip()):
            yield Row(place, (None,) * len(places))
        elif len(fields) == len(header):
            yield Row(place, tuple(fields[index] for index in places))
        else:
            raise ParamsError(
                f"{shown(path)} must have {len(header)} fields in every row, as in its header; a field that holds a "
                f"delimiter, a quote or a line end is in double quotes. Received: {len(fields)} fields in {place}"
            )


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield place and fields of each record of a CSV text, as Python's csv module reads it in its strict mode.

    Where the header ends in LF or CRLF, a lone CR is text, in quotes or not. There is no NUL in the text, so that it
    can stand for such a CR, which the csv module would take for a line end.
    """
    end = _header_end(text, delimiter)
    lone = end == "\n" and "\r" in text
    lines = lines_of(re.sub("\r(?!\n)", "\0", text) if lone else text, end)
    reader = csv.reader((line + end for line in lines), delimiter=delimiter, strict=True)
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ParamsError(
                f"{shown(path)} must be CSV with a header, quotes within a quoted field doubled. "
                f"Received: a row that begins in {place}: {shown(error)}"
            ) from error
        yield place, [field.replace("\0", "\r") for field in fields] if lone else fields


def _header_end(text: str, delimiter: str) -> str:
    """Return CR if that alone ends the first record of a CSV text that is not empty, else LF."""
    last = ""

    def lines() -> Iterator[str]:
        nonlocal last
        for match in re.finditer("[^\r\n]*(?:\r\n|[\r\n]|$)", text):
            last = match[0]
            yield last

    # Malformed records are reported when they are read.
    with contextlib.suppress(csv.Error):
        next((fields for fields in csv.reader(lines(), delimiter=delimiter, strict=True) if fields), None)
    return "\r" if last.endswith("\r") else "\n"


def _check_once(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """Stop where a column that is wanted is there twice."""
    for name in wanted:
        if columns.count(name) > 1:
            raise ParamsError(
                f"{shown(path)} must have column {shown(name)} once. Received: {columns.count(name)} of it"
            )


def _json_value(text: str) -> Any:
    """Return a JSON value; a number as its text, NaN as None, the value of a repeated key as `TWICE`.

    Raises:
        ValueError: it is malformed or nested too deeply; says in which column.
    """

    def named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            values[name] = TWICE if name in values else value
        return values

    try:
        return json.loads(
            text,
            parse_int=str,
            parse_float=str,
            parse_constant=lambda name: None if name == "NaN" else name,
            object_pairs_hook=named,
        )
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{error.msg} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _objects(path: Path, placed: Iterable[tuple[str, Any]], wanted: Sequence[str]) -> Table:
    """Return JSON objects as a table: its columns are all their keys."""
    columns: dict[str, None] = {}
    rows = []
    for place, value in placed:
        if not isinstance(value, dict):
            raise ParamsError(f"{shown(path)} must hold JSON objects. Received: {place} is {kind_of(value)}")
        columns.update(dict.fromkeys(value))
        rows.append(Row(place, tuple(map(value.get, wanted))))
    return Table(list(columns), rows)


def _jsonl(path: Path, data: bytes, wanted: Sequence[str]) -> Table:
    """Read a file with one JSON object per line."""

    def values(text: str) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(plain_lines(text), start=1):
            try:
                yield f"line {number}", _json_value(line) if line.strip() else {}
            except ValueError as error:
                raise ParamsError(
                    f"{shown(path)} must hold one JSON object per line. Received: line {number}: {shown(error)}"
                ) from error

    return _objects(path, values(decode(path, data)), wanted)


def _json(path: Path, data: bytes, wanted: Sequence[str]) -> Table:
    """Read a file with a JSON array of objects; what does not begin as an array is read as one object per line."""
    text = decode(path, data)
    if not text.lstrip().startswith("["):
        return _jsonl(path, data, wanted)
    try:
        values = _json_value(text)
    except ValueError as error:
        raise ParamsError(f"{shown(path)} must hold a JSON array of objects. Received: {shown(error)}") from error
    return _objects(path, ((f"row {row}", value) for row, value in enumerate(values)), wanted)


def _parquet(path: Path, data: bytes, wanted: Sequence[str]) -> Table:
    """Read a Parquet file."""
    try:
        file = parquet.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        columns = file.schema_arrow.names
        if not set(wanted) <= set(columns):
            return Table(columns, [])
        _check_once(path, columns, wanted)
        frame = file.read(columns=list(dict.fromkeys(wanted)))
        frame.validate(full=True)
        values = [_column_values(frame.column(name)) for name in wanted]
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ParamsError(f"{shown(path)} must be a whole Parquet file. Received: {shown(error)}") from error
    return Table(columns, [Row(f"row {row}", each) for row, each in enumerate(zip(*values, strict=True))])


def _column_values(column: Any) -> list[Any]:
    """Return the values of an Arrow column, numbers as text."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        # With no more digits than the column's own type has; null comes as NaN.
        return [None if number != number else str(number) for number in column.to_numpy()]
    if pa.types.is_integer(column.type) or pa.types.is_decimal(column.type):
        column = column.cast(pa.string())
    return column.to_pylist()


def kind_of(value: Any) -> str:
    """Return the kind of a value that is not text, for a message."""
    names = {list: "a list", dict: "an object", bytes: "binary data", bool: "a boolean", str: "a text or number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


READERS: dict[str, Callable[[Path, bytes, Sequence[str]], Table]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _text_lines,
}
