"""Reviews, or pairs of prompt and response, from a person's own files.

Purpose: which columns are read, and one rule for what stands in them, whatever the format: a text stands as it is, a
number or a boolean becomes its text, null is empty, and anything else stops with file, row and column.
Reads: the files that `prepare.train_file` or `prepare.validation_file` names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from stages.core.errors import ParamsError, shown, shown_list
from stages.core.reviews import Label, RawReview
from stages.core.table_files import READERS, TWICE, Table, format_of, kind_of, read_table

WHOLE_NUMBER = re.compile(r"(0|-?[1-9][0-9]{0,18})(\.0)?")


class Template(NamedTuple):
    """A text over columns: pieces of text, each with the column whose value follows it, or None."""

    pieces: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> list[str]:
        """The columns in it."""
        return [column for _, column in self.pieces if column is not None]

    def fill(self, values: dict[str, str | None]) -> str | None:
        """Return the text, None if all its columns are blank; white space that a blank one leaves at the ends goes."""
        if len(self.pieces) == 1 and not self.pieces[0][0]:
            return values[self.columns[0]]
        found = [values[column] or "" for column in self.columns]
        if not any(value.strip() for value in found):
            return None
        text = "".join(piece + (values[column] or "" if column is not None else "") for piece, column in self.pieces)
        return text if all(found) else text.strip()


class Columns(NamedTuple):
    """What is read of a file: columns or templates over them; of pairs `text` is the response."""

    text: str
    label: str | None = None
    prompt: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """What is read, by the setting that names it."""
        named = {
            "text_column" if self.prompt is None else "response_column": self.text,
            "prompt_column": self.prompt,
            "label_column": self.label,
        }
        return {setting: column for setting, column in named.items() if column is not None}


def template(setting: str, column: str) -> Template:
    """Return what a setting names: a column, or a template if there are columns in braces in it.

    Raises:
        ParamsError: braces that do not match, or more than a name in them.
    """
    try:
        parsed = list(Formatter().parse(column))
    except ValueError as error:
        raise ParamsError(
            f"prepare.{setting} must be a column or a template such as '{{a}} {{b}}'. "
            f"Received: prepare.{setting}={shown(column)} ({error})"
        ) from error
    if all(name is None for _, name, _, _ in parsed):
        return Template((("", column),))
    if any(name == "" or specification or conversion for _, name, specification, conversion in parsed):
        raise ParamsError(
            f"prepare.{setting} must have a column's name, and nothing else, in each pair of braces. "
            f"Received: prepare.{setting}={shown(column)}"
        )
    return Template(tuple((piece, name) for piece, name, _, _ in parsed))


def file_reviews(path: Path, setting: str, columns: Columns, say: Callable[[str], None]) -> list[RawReview]:
    """Return the reviews of a file in its order; the ids are `<file name>:<row>`, rows from 0.

    Args:
        path: the file; its suffix names the format, see `stages.core.table_files`.
        setting: the settings key that named it, for messages.
        columns: what is read; a .txt file has only texts.
        say: prints one line for the person.

    Raises:
        ParamsError: no such file, another format, a column that is not there, or content that cannot be used.
        StageError: the file cannot be read.
    """
    suffix = format_of(path)
    if suffix not in READERS:
        raise ParamsError(
            f"{setting} must end in one of {', '.join(READERS)}, or that and .gz. Received: {setting}={shown(path)}"
        )
    if not is_file(path):
        raise ParamsError(f"{setting} must name a file that exists. Received: {setting}={shown(path)}")
    if suffix == ".txt":
        for name in ("prompt_column", "label_column"):
            if name in columns.settings:
                raise ParamsError(
                    f"prepare.{name} must be null with a text file. "
                    f"Received: prepare.{name}={shown(columns.settings[name])}"
                )
        table, wanted = read_table(path, []), [columns.text]
        templates = {"text_column": Template((("", columns.text),))}
    else:
        templates = {name: template(name, column) for name, column in columns.settings.items()}
        wanted = list(dict.fromkeys(column for each in templates.values() for column in each.columns))
        table = read_table(path, wanted)
        _check_columns(path, table, templates, say)
    reviews: list[tuple[str | None, str | None, str | None]] = []
    for place, row in table.rows:
        values = {
            column: _cell(value, path, place, None if suffix == ".txt" else column)
            for column, value in zip(wanted, row, strict=True)
        }
        texts = {name: each.fill(values) for name, each in templates.items()}
        text = texts.get("text_column", texts.get("response_column"))
        reviews.append((text, texts.get("prompt_column"), texts.get("label_column")))
    labels = labels_of([label for _, _, label in reviews])
    return [
        RawReview(text, label, f"{path.name}:{row}", prompt, columns.prompt is not None)
        for row, ((text, prompt, _), label) in enumerate(zip(reviews, labels, strict=True))
    ]


def is_file(path: Path) -> bool:
    """Return whether a path names a file; one that no file can have names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def labels_of(texts: list[str | None]) -> list[Label]:
    """Return labels as whole numbers if every one is such that fits 64 bits, else as they stand; None where blank.

    A zero in front makes a number a word: 01 is not 1. A table of decimal numbers has whole ones as 1.0.
    """
    labels = [text if text is not None and text.strip() else None for text in texts]
    matches = [WHOLE_NUMBER.fullmatch(label) for label in labels if label is not None]
    if all(match is not None and -(2**63) <= int(match[1]) < 2**63 for match in matches):
        return [None if label is None else int(label.removesuffix(".0")) for label in labels]
    return labels


def _check_columns(path: Path, table: Table, templates: dict[str, Template], say: Callable[[str], None]) -> None:
    """Stop when a column is not there, and tell which are not used."""
    for setting, each in templates.items():
        for column in each.columns:
            if column not in table.columns:
                raise ParamsError(
                    f"prepare.{setting} must be a column of {shown(path.name)}: "
                    f"{shown_list(table.columns) or 'it has none'}. Received: prepare.{setting}={shown(column)}"
                )
    used = {column for each in templates.values() for column in each.columns}
    if unused := [column for column in table.columns if column not in used]:
        say(f"{shown(path.name)}: columns not used: {shown_list(unused)}.")


def _cell(value: Any, path: Path, place: str, column: str | None) -> str | None:
    """Return what stands in a cell as text, None for null."""
    if value is None:
        return None
    where = f"in {place} of {shown(path)}" + ("" if column is None else f", column {shown(column, 40)}")
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is TWICE:
        raise ParamsError(f"A key must be in an object once. Received: it is there twice {where}")
    if not isinstance(value, str):
        raise ParamsError(f"A cell must be a text, a number, a boolean or null. Received: {kind_of(value)} {where}")
    if "\0" in value:
        raise ParamsError(f"A cell must be text. Received: a NUL character {where}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair.
        raise ParamsError(f"A cell must hold whole Unicode characters. Received: half of one {where}") from error
    return value
