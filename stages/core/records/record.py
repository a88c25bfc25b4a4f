"""The forms that all records share: a JSON file, and a file of JSON lines.

Purpose: whoever writes a file and whoever reads it use the same class, so that a renamed key breaks in one place, and a
damaged file is reported in one line by every reader. Units are in the names of the fields: `_bytes`, `_seconds`,
`_per_second`, `_fraction` (of one); an integer that has none is a count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.core.common.errors import StageError
from stages.core.common.paths import Paths
from stages.core.files import write_json, write_text

Value = TypeVar("Value")
# A key that the file leaves out where it does not apply.
OrAbsent = Annotated[Value | None, Field(exclude_if=lambda value: value is None)]


class Record(BaseModel):
    """A part of a file that crosses a stage's boundary; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Record):
    """A JSON file that crosses a stage's boundary."""

    model_config = ConfigDict(allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """Return what the file holds, its keys in the order of the fields."""
        return self.model_dump(mode="json", by_alias=True)

    def write(self, path: Path) -> None:
        """Write the file; the same values give the same bytes."""
        write_json(path, self.content())

    @classmethod
    def read(cls, paths: Paths, relative: str) -> Self:
        """Read a file that a stage wrote.

        Raises:
            StageError: the file does not exist, or does not have its form.
        """
        try:
            return cls.model_validate_json(paths.read(relative).read_bytes())
        except ValidationError as error:
            raise broken(relative, problem(error)) from error


class LineRecord(Record):
    """A line of a file of JSON lines that crosses a stage's boundary."""

    @staticmethod
    def write_lines(path: Path, records: Iterable[Record]) -> None:
        """Write one object a line. No record makes one empty line: of an empty file DVC would warn at each look."""
        lines = (json.dumps(record.model_dump(), ensure_ascii=False) for record in records)
        write_text(path, "\n".join(lines) + "\n")

    @classmethod
    def read_lines(cls, paths: Paths, relative: str) -> list[Self]:
        """Read a file that a stage wrote.

        Raises:
            StageError: the file does not exist, or a line does not have its form.
        """
        found = []
        # Only a newline ends a line: splitlines() would also cut at the U+2028 that a model may write.
        for number, line in enumerate(read_text(paths, relative).split("\n"), 1):
            if line.strip():
                try:
                    found.append(cls.model_validate_json(line))
                except ValidationError as error:
                    keys = " and ".join(cls.model_fields)
                    raise broken(relative, f"line {number} must be an object with {keys}") from error
        return found


def read_text(paths: Paths, relative: str) -> str:
    """Return the text of a file that a stage wrote.

    Raises:
        StageError: the file does not exist, or is not UTF-8 text.
    """
    try:
        return paths.read(relative).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise broken(relative, f"it must be UTF-8 text, {error}") from error


def problem(error: ValidationError) -> str:
    """Return the first thing that is wrong with a file, in one line."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{place}: {first['msg']}. Received: {str(first['input'])[:80]!r}"


def broken(relative: str, problem: str) -> StageError:
    """Return the error of a file that does not have its form."""
    return StageError(f"{relative} does not have its form: {problem}. Run `dvc repro` to write it again.")
