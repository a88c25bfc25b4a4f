"""Reviews, or pairs of prompt and response, from the user's own files.

Purpose: which columns are read, and one rule for their values, whatever the format: a text is kept as it is, a
number or a boolean becomes its text, null is empty, and anything else stops with file, row and column.
Reads: the files that `prepare.train_file` or `prepare.validation_file` names.
"""

from __future__ import annotations

import glob
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from stages.core.common.errors import ParamsError, shown, shown_list
from stages.core.common.paths import own_path
from stages.core.prepare.cleaning import Label, RawReview
from stages.core.prepare.tables import READERS, TWICE, Table, kind_of, read_table
from stages.core.prepare.text_files import format_of, read_text

logger = logging.getLogger(__name__)

PAIRS = {
    "alpaca": ("{instruction}\n\n{input}", "output"),
    "dolly": ("{instruction}\n\n{context}", "response"),
}
"""Prompt and response of a format, as templates over its columns."""

CONVERSATIONS = {"sharegpt": ("conversations", "from", "value"), "messages": ("messages", "role", "content")}
"""The column of a format that holds a list of turns, and the keys of a turn's role and text."""

WHOLE_NUMBER = re.compile(r"(0|-?[1-9][0-9]{0,18})(\.0)?")


class Template(NamedTuple):
    """A text over columns: pieces of text, each with the column whose value follows it, or None."""

    pieces: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> list[str]:
        """The columns in it."""
        return [column for _, column in self.pieces if column is not None]

    def fill(self, values: dict[str, str | None]) -> str | None:
        """Return the text, None if all its columns are blank; a blank column leaves no white space at the ends."""
        if len(self.pieces) == 1 and not self.pieces[0][0]:
            return values[self.columns[0]]
        found = [values[column] or "" for column in self.columns]
        if not any(value.strip() for value in found):
            return None
        text = "".join(piece + (values[column] or "" if column is not None else "") for piece, column in self.pieces)
        return text if all(found) else text.strip()


class Columns(NamedTuple):
    """What is read of a file: columns or templates over them; of pairs `text` is the response.

    `format` is a name of `PAIRS` or `CONVERSATIONS` where that said which; in the latter `text` is a column whose cells
    are lists of turns.
    """

    text: str
    label: str | None = None
    prompt: str | None = None
    format: str = "columns"

    @property
    def pairs(self) -> bool:
        """Whether a row has a prompt and a response."""
        return self.prompt is not None or self.format in CONVERSATIONS

    @property
    def settings(self) -> dict[str, str]:
        """What is read, by the setting that names it."""
        named = {
            "prompt_column": self.prompt,
            "text_column" if self.prompt is None else "response_column": self.text,
            "label_column": self.label,
        }
        return {setting: column for setting, column in named.items() if column is not None}

    def received(self, setting: str) -> tuple[str, str]:
        """Return the setting behind this one, and it with its value, for a message."""
        if self.format != "columns" and setting != "label_column":
            return "prepare.format", f"prepare.format={self.format}, which needs {shown(self.settings[setting])}"
        return f"prepare.{setting}", f"prepare.{setting}={shown(self.settings[setting])}"


def columns_of(format: str, text: str, label: str | None, prompt: str | None, response: str | None) -> Columns:
    """Return what is read with the settings `format`, `text_column`, `label_column`, `prompt_column`, ..."""
    if format in CONVERSATIONS:
        return Columns(CONVERSATIONS[format][0], label, None, format)
    if format in PAIRS:
        prompt, response = PAIRS[format]
    return Columns(response if response is not None else text, label, prompt, format)


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
        # {{ and }} are braces in a column's name.
        return Template((("", "".join(piece for piece, *_ in parsed)),))
    if any(name == "" or specification or conversion for _, name, specification, conversion in parsed):
        raise ParamsError(
            f"prepare.{setting} must have a column's name, and nothing else, in each pair of braces. "
            f"Received: prepare.{setting}={shown(column)}"
        )
    return Template(tuple((piece, name) for piece, name, _, _ in parsed))


def data_files(root: Path, setting: str, value: str | list[str]) -> list[Path]:
    """Return the files (or folders) that a setting names, in its order; those that a pattern finds by name.

    Raises:
        ParamsError: a path that cannot exist, or a pattern that finds nothing.
    """
    found: list[Path] = []
    for each in [value] if isinstance(value, str) else value:
        path = own_path(root, setting, each)
        if path.exists() or not glob.has_magic(each):
            found.append(path)
            continue
        # pathlib's own takes no pattern that begins at the root.
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
        if not matches:
            raise ParamsError(f"{setting} must find a file. Received: {setting}={shown(each)}, which finds none")
        found += matches
    return found


def file_reviews(paths: Sequence[Path], setting: str, columns: Columns) -> list[RawReview]:
    """Return the reviews of files in their order; the ids are `<file name>:<row>`, rows from 0.

    Args:
        paths: the files; a suffix names the format, see `stages.core.prepare.tables`. A folder has folders `pos` and
            `neg` (or one of them) with one text per file, as the Large Movie Review Dataset has; the label is 1 or 0.
        setting: the settings key that named them, for messages.
        columns: what is read; a .txt file has only texts.

    Raises:
        ParamsError: no such file, another format, a column that is not there, or content that cannot be used.
        StageError: a file cannot be read.
    """
    names = Counter(path.name for path in paths)
    read: list[tuple[str, Cells]] = []
    for path in paths:
        cells = _folder(path, setting) if is_folder(path) else _file(path, setting, columns)
        name = path.name if names[path.name] == 1 else "/".join(path.parts[-2:])
        read += [(f"{name}:{row}", each) for row, each in enumerate(cells)]
    labels = labels_of([cells.label for _, cells in read])
    return [
        RawReview(cells.text, label, id, cells.prompt, columns.pairs, cells.other, cells.earlier, cells.system)
        for (id, cells), label in zip(read, labels, strict=True)
    ]


class Cells(NamedTuple):
    """What a row has, None for what it does not.

    Of a conversation, prompt and text are the last exchange, `earlier` the turns before it, and `system` what a system
    says before all; `other`: it is one in which prompts and responses do not alternate.
    """

    text: str | None
    prompt: str | None = None
    label: str | None = None
    other: bool = False
    earlier: tuple[str | None, ...] = ()
    system: str | None = None


def _folder(path: Path, setting: str) -> Iterator[Cells]:
    """Yield the texts below the folders `pos` and `neg`, by name."""
    parts = {label: sorted((path / name).glob("*.txt")) for label, name in (("1", "pos"), ("0", "neg"))}
    if not any(parts.values()):
        raise ParamsError(
            f"{setting} must name a file, or a folder that has .txt files in folders pos and neg. "
            f"Received: {setting}={shown(path)}"
        )
    for label, files in parts.items():
        for file in files:
            yield Cells(_cell(read_text(file), file, "line 1", None), None, label)


def _file(path: Path, setting: str, columns: Columns) -> Iterator[Cells]:
    """Yield what the rows of a file have."""
    suffix = format_of(path)
    if suffix not in READERS:
        raise ParamsError(
            f"{setting} must end in one of {', '.join(READERS)}, or that and .gz. Received: {setting}={shown(path)}"
        )
    if not is_file(path):
        raise ParamsError(f"{setting} must name a file that exists. Received: {setting}={shown(path)}")
    if suffix == ".txt":
        for name in columns.settings:
            if name != "text_column" or columns.format != "columns":
                key, received = columns.received(name)
                allowed = "columns" if key == "prepare.format" else "null"
                raise ParamsError(f"{key} must be {allowed} with a text file. Received: {received}")
        for place, (line,) in read_table(path, []).rows:
            yield Cells(_cell(line, path, place, None))
        return
    templates = {name: template(name, column) for name, column in columns.settings.items()}
    wanted = list(dict.fromkeys(column for each in templates.values() for column in each.columns))
    table = read_table(path, wanted)
    _check_columns(path, table, columns, templates)
    for place, row in table.rows:
        found = dict(zip(wanted, row, strict=True))
        if columns.format in CONVERSATIONS:
            label = None if columns.label is None else _cell(found[columns.label], path, place, columns.label)
            turns = _turns(found[columns.text], columns, path, place)
            yield _conversation(turns)._replace(label=label)
            continue
        values = {column: _cell(value, path, place, column) for column, value in found.items()}
        texts = {name: each.fill(values) for name, each in templates.items()}
        text = texts.get("text_column", texts.get("response_column"))
        yield Cells(text, texts.get("prompt_column"), texts.get("label_column"))


def _turns(value: Any, columns: Columns, path: Path, place: str) -> list[tuple[str, str | None]]:
    """Return role and text of each turn of a conversation.

    Raises:
        ParamsError: it is no list of objects, or a role or text is none.
    """
    column, role, content = CONVERSATIONS[columns.format]
    if value is None:
        return []
    if not isinstance(value, list):
        raise ParamsError(
            f"A conversation must be a list of objects with {role} and {content}. "
            f"Received: {kind_of(value)} in {place} of {shown(path)}, column {column}"
        )
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get(role), str):
            raise ParamsError(
                f"A turn must be an object with {role} and {content}. "
                f"Received: {kind_of(turn)} without {role} in {place} of {shown(path)}, column {column}"
            )
        turns.append((turn[role], _cell(turn.get(content), path, place, f"{column}.{content}")))
    return turns


def _conversation(turns: list[tuple[str, str | None]]) -> Cells:
    """Return the turns of a conversation, and what a system says before them."""
    if not turns:
        return Cells(None)
    system = turns[0][1] if turns[0][0] in ("system", "developer") else None
    turns = turns[1:] if turns[0][0] in ("system", "developer") else turns
    speakers = [role not in ("user", "human") for role, _ in turns]
    known = all(role in ("user", "human", "assistant", "gpt", "model") for role, _ in turns)
    if not known or not speakers or speakers != [False, True] * (len(turns) // 2):
        return Cells(None, other=True)
    texts = [text for _, text in turns]
    return Cells(texts[-1], texts[-2], earlier=tuple(texts[:-2]), system=(system or "").strip() or None)


def is_file(path: Path) -> bool:
    """Return whether a path names a file; one that no file can have names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Return whether a path names a folder, as `is_file` does for a file."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def labels_of(texts: list[str | None]) -> Sequence[Label]:
    """Return labels as whole numbers if every one is such that fits 64 bits, else unchanged; None where blank.

    A zero in front makes a number a word: 01 is not 1. A table of decimal numbers has whole ones as 1.0.
    """
    labels = [text if text is not None and text.strip() else None for text in texts]
    matches = [WHOLE_NUMBER.fullmatch(label) for label in labels if label is not None]
    if all(match is not None and -(2**63) <= int(match[1]) < 2**63 for match in matches):
        return [None if label is None else int(label.removesuffix(".0")) for label in labels]
    return labels


def _check_columns(path: Path, table: Table, columns: Columns, templates: dict[str, Template]) -> None:
    """Stop when a column is missing, and log which are not used."""
    for setting, each in templates.items():
        for column in each.columns:
            if column not in table.columns:
                key, received = columns.received(setting)
                if "message_tree_id" in table.columns:
                    raise ParamsError(
                        f"{shown(path.name)} has trees of messages, as OpenAssistant publishes them, with several "
                        f"replies to a message. Received: {received}. Write one path of each tree as a list of turns, "
                        "and read it with prepare.format: messages"
                    )
                plain = column == columns.settings[setting] and columns.format == "columns"
                what = "be a column" if plain else "name columns"
                raise ParamsError(
                    f"{key} must {what} of {shown(path.name)}: {shown_list(table.columns) or 'it has none'}. "
                    f"Received: {received}"
                )
    used = {column for each in templates.values() for column in each.columns}
    if unused := [column for column in table.columns if column and column not in used]:
        logger.info(f"{shown(path.name)}: columns not used: {shown_list(unused)}.")


def _cell(value: Any, path: Path, place: str, column: str | None) -> str | None:
    """Return a cell's value as text, None for null."""
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
