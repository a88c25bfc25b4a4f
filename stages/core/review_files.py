"""Reviews from a person's own file: CSV, JSONL, Parquet, or text with one review a line.

Purpose: read what people have, with errors that name the file, the line and the columns there are.
Reads: the file that `prepare.train_file` or `prepare.validation_file` names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core.errors import ParamsError
from stages.core.reviews import Label, RawReview


def file_reviews(path: Path, setting: str, text_column: str, label_column: str | None) -> list[RawReview]:
    """Return the reviews of a file in its order; the ids are `<file name>:<row>`, rows from 0.

    Args:
        path: the file; its suffix names the format: .csv, .jsonl, .parquet or .txt, all text in UTF-8.
        setting: the settings key that named it, for messages.
        text_column: the column (JSON key) of the text; a .txt file has none.
        label_column: the column of the label, or None.

    Raises:
        ParamsError: no such file, another format, a column that is not there, or content that cannot be read.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".txt": _text_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ParamsError(f"{setting} must end in one of {', '.join(readers)}. Received: {setting}={path}")
    if not path.is_file():
        raise ParamsError(f"{setting} must name a file that exists. Received: {setting}={path}")
    if path.suffix.lower() == ".txt" and label_column is not None:
        raise ParamsError(
            f"prepare.label_column must be null with a text file. Received: prepare.label_column={label_column}"
        )
    try:
        rows = list(reader(path, text_column, label_column))
    except UnicodeDecodeError as error:
        raise ParamsError(f"{setting} must be UTF-8 text. Received: {setting}={path} ({error})") from error
    for row, (text, _) in enumerate(rows):
        if isinstance(text, str) and not _is_unicode(text):
            raise ParamsError(
                f"{setting} must hold whole Unicode characters. Received: half of one in row {row} of {path}"
            )
    labels = _uniform([_label(label) for _, label in rows])
    return [
        RawReview(text, label, f"{path.name}:{row}")
        for row, ((text, _), label) in enumerate(zip(rows, labels, strict=True))
    ]


Row = tuple[Any, Any]


def _csv_rows(path: Path, text_column: str, label_column: str | None) -> Iterator[Row]:
    """Yield (text, label) of a CSV file with a header line. "NA" and "null" are texts; only an empty cell is empty."""
    import pandas as pd

    try:
        columns = list(pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns)
        wanted = _check_columns(path, columns, text_column, label_column)
        frame = pd.read_csv(
            path, usecols=wanted, dtype={text_column: str}, keep_default_na=False, na_values=[""], encoding="utf-8-sig"
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ParamsError(f"{path} must be CSV with a header line. Received: {' '.join(str(error).split())}") from error
    yield from _frame_rows(frame, text_column, label_column)


def _parquet_rows(path: Path, text_column: str, label_column: str | None) -> Iterator[Row]:
    """Yield (text, label) of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(path).names
        frame = pq.read_table(path, columns=_check_columns(path, columns, text_column, label_column))
    except pa.ArrowInvalid as error:
        raise ParamsError(f"{path} must be a Parquet file. Received: {' '.join(str(error).split())}") from error
    texts = frame.column(text_column).to_pylist()
    labels = frame.column(label_column).to_pylist() if label_column is not None else [None] * len(texts)
    yield from zip(texts, labels, strict=True)


def _jsonl_rows(path: Path, text_column: str, label_column: str | None) -> Iterator[Row]:
    """Yield (text, label) of a file with one JSON object a line; an empty line is an empty review."""
    columns: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError as error:
                raise ParamsError(
                    f"{path} must hold one JSON object a line. Received: line {number}: {error}"
                ) from error
            if not isinstance(row, dict):
                raise ParamsError(
                    f"{path} must hold one JSON object a line. Received: line {number} is a {type(row).__name__}"
                )
            columns.update(dict.fromkeys(row))
            rows.append(row)
    _check_columns(path, list(columns), text_column, label_column)
    for row in rows:
        yield row.get(text_column), row.get(label_column) if label_column is not None else None


def _text_rows(path: Path, text_column: str, label_column: str | None) -> Iterator[Row]:
    """Yield (line, None) of a text file."""
    with path.open(encoding="utf-8-sig") as stream:
        for line in stream:
            yield line.rstrip("\n"), None


def _frame_rows(frame: Any, text_column: str, label_column: str | None) -> Iterator[Row]:
    """Yield (text, label) of a pandas frame as Python objects."""
    labels = frame[label_column].tolist() if label_column is not None else [None] * len(frame)
    yield from zip(frame[text_column].tolist(), labels, strict=True)


def _check_columns(path: Path, columns: list[str], text_column: str, label_column: str | None) -> list[str]:
    """Return the columns to read, once they are known to be there."""
    for setting, column in (("text_column", text_column), ("label_column", label_column)):
        if column is not None and column not in columns:
            raise ParamsError(
                f"prepare.{setting} must be a column of {path.name}: {', '.join(map(str, columns)) or 'it has none'}. "
                f"Received: prepare.{setting}={column}"
            )
    return list(dict.fromkeys([text_column, *([label_column] if label_column is not None else [])]))


def _label(value: Any) -> Label:
    """Return a label as an int, a string, or None for an empty cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | int):
        return int(value)
    # A column of whole numbers with an empty cell comes as floats.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value)


def _uniform(labels: list[Label]) -> list[Label]:
    """Return labels of one type: all ints, or, where one is a string, all strings."""
    if any(isinstance(label, str) for label in labels):
        return [None if label is None else str(label) for label in labels]
    return labels


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8: JSON can escape half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
