"""Reviews, or pairs of prompt and response, from a person's own file: CSV, JSONL, Parquet, or text with one a line.

Purpose: read what people have, with errors that name the file, the line and the columns there are.
Reads: the file that `prepare.train_file` or `prepare.validation_file` names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.errors import ParamsError
from stages.core.reviews import Label, RawReview


def file_reviews(
    path: Path, setting: str, text_column: str, label_column: str | None, prompt_column: str | None = None
) -> list[RawReview]:
    """Return the reviews of a file in its order; the ids are `<file name>:<row>`, rows from 0.

    Args:
        path: the file; its suffix names the format: .csv, .jsonl, .parquet or .txt, all text in UTF-8.
        setting: the settings key that named it, for messages.
        text_column: the column (JSON key) of the text, of pairs the response; a .txt file has none.
        label_column: the column of the label, or None.
        prompt_column: the column of the prompt; None: the rows are no pairs.

    Raises:
        ParamsError: no such file, another format, a column that is not there, or content that cannot be read.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".txt": _text_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ParamsError(f"{setting} must end in one of {', '.join(readers)}. Received: {setting}={path}")
    if not path.is_file():
        raise ParamsError(f"{setting} must name a file that exists. Received: {setting}={path}")
    columns = Columns(text_column, label_column, prompt_column)
    if path.suffix.lower() == ".txt":
        for name, column in (("label_column", label_column), ("prompt_column", prompt_column)):
            if column is not None:
                raise ParamsError(f"prepare.{name} must be null with a text file. Received: prepare.{name}={column}")
    try:
        rows = list(reader(path, columns))
    except UnicodeDecodeError as error:
        raise ParamsError(f"{setting} must be UTF-8 text. Received: {setting}={path} ({error})") from error
    for row, (*texts, _) in enumerate(rows):
        if any(isinstance(text, str) and not _is_unicode(text) for text in texts):
            raise ParamsError(
                f"{setting} must hold whole Unicode characters. Received: half of one in row {row} of {path}"
            )
    labels = _uniform([_label(label) for _, _, label in rows])
    return [
        RawReview(text, label, f"{path.name}:{row}", prompt, prompt_column is not None)
        for row, ((text, prompt, _), label) in enumerate(zip(rows, labels, strict=True))
    ]


class Columns(NamedTuple):
    """Which columns are read, by name; of pairs `text` is the response's."""

    text: str
    label: str | None
    prompt: str | None

    @property
    def named(self) -> dict[str, str]:
        """The columns there must be, by the setting that names each."""
        settings = {
            "text_column" if self.prompt is None else "response_column": self.text,
            "prompt_column": self.prompt,
            "label_column": self.label,
        }
        return {setting: column for setting, column in settings.items() if column is not None}


Row = tuple[Any, Any, Any]


def _csv_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header line. "NA" and "null" are texts; only an empty cell is empty."""
    import pandas as pd

    texts = [column for column in (columns.text, columns.prompt) if column is not None]
    try:
        wanted = _check_columns(path, list(pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns), columns)
        frame = pd.read_csv(
            path,
            usecols=wanted,
            dtype=dict.fromkeys(texts, str),
            keep_default_na=False,
            na_values=[""],
            encoding="utf-8-sig",
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ParamsError(f"{path} must be CSV with a header line. Received: {' '.join(str(error).split())}") from error
    yield from _rows({name: frame[name].tolist() for name in wanted}, columns)


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        wanted = _check_columns(path, pq.read_schema(path).names, columns)
        frame = pq.read_table(path, columns=wanted)
    except pa.ArrowInvalid as error:
        raise ParamsError(f"{path} must be a Parquet file. Received: {' '.join(str(error).split())}") from error
    yield from _rows({name: frame.column(name).to_pylist() for name in wanted}, columns)


def _jsonl_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object a line; an empty line is an empty review."""
    keys: dict[str, None] = {}
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
            keys.update(dict.fromkeys(row))
            rows.append(row)
    wanted = _check_columns(path, list(keys), columns)
    yield from _rows({name: [row.get(name) for row in rows] for name in wanted}, columns)


def _text_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the lines of a text file, which has no columns."""
    with path.open(encoding="utf-8-sig") as stream:
        for line in stream:
            yield line.rstrip("\n"), None, None


def _rows(values: dict[str, list[Any]], columns: Columns) -> Iterator[Row]:
    """Yield (text, prompt, label) of each row, None for what is not read."""
    nothing = [None] * len(values[columns.text])
    read = (nothing if name is None else values[name] for name in (columns.text, columns.prompt, columns.label))
    yield from zip(*read, strict=True)


def _check_columns(path: Path, found: list[str], columns: Columns) -> list[str]:
    """Return the columns to read, each once, when they are known to be there."""
    for setting, column in columns.named.items():
        if column not in found:
            raise ParamsError(
                f"prepare.{setting} must be a column of {path.name}: {', '.join(map(str, found)) or 'it has none'}. "
                f"Received: prepare.{setting}={column}"
            )
    return list(dict.fromkeys(columns.named.values()))


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
