"""Edits values in `params.yaml`, in the style in which DVC writes it (`dvc exp run -S`), and keeps its comments.

Purpose: `python -m stages.profile`. ruamel.yaml reads the file with its comments and rewrites it, as DVC does.
It maps text to text, and reads and writes no file.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from stages.core.common.errors import ParamsError, shown
from stages.core.config.reader import parse, plain


class Change(NamedTuple):
    """A value that is replaced: its `section.key`, and both as YAML, on one line."""

    key: str
    old: str
    new: str


def rewrite(text: str, values: Mapping[str, str], file_name: str) -> tuple[str, list[Change]]:
    """Return the text with some values replaced, and what changed; if all are equal the text is unchanged.

    Args:
        text: of the settings file.
        values: YAML by `section.key`.
        file_name: for messages.

    Raises:
        ParamsError: a key is not there, or the file is in a form that cannot be edited.
    """
    # ruamel keeps the other ending in comments and nowhere else.
    line_end = "\r\n" if "\r\n" in text else "\n"
    content = parse(text.replace("\r\n", "\n"), file_name)
    wanted = differing(content, values, file_name)
    if not wanted:
        return text, []
    changes = [
        Change(key, _one_line(_find(content, key, file_name)), _one_line(value)) for key, value in wanted.items()
    ]
    expected = plain(content)
    for key, value in wanted.items():
        _put(content, key, value)
        _put(expected, key, plain(value))
    stream = io.StringIO()
    _as_dvc_writes().dump(content, stream)
    result = stream.getvalue().replace("\n", line_end)
    if lost := sorted(set(_comments(text)) - set(_comments(result))):
        raise ParamsError(
            f"{file_name}: a comment between a list and the next key cannot be kept when the list changes. "
            f"Received: {shown(lost[0])}. Move it above the list's key."
        )
    # An alias, for example, has its value elsewhere in the file.
    if plain(parse(result, file_name)) != expected:
        raise ParamsError(
            f"{file_name} is written in a way that cannot be changed. Received: {', '.join(wanted)}. "
            "Change these by hand, or start from git's version of the file."
        )
    return result, changes


def _as_dvc_writes() -> Any:
    """Return ruamel's writer with DVC's settings (`_get_yaml` in dvc/utils/serialize/_yaml.py)."""
    yaml = YAML()
    yaml.default_flow_style = False
    return yaml


def differing(content: Mapping[str, Any], values: Mapping[str, str], file_name: str) -> dict[str, Any]:
    """Return those of some values that differ from the settings', by key: lists and sections are plain Python ones.

    Args:
        content: the sections, as parsed.
        values: YAML by `section.key`.
        file_name: for messages.

    Raises:
        ParamsError: a key is not there.
    """
    # One document for all: each by itself would be parsed ten times as slowly.
    lines = [f'"{key}": {written}' for key, written in values.items()]
    wanted = parse("\n".join(lines), "a value") if lines else {}
    return {
        key: _without_style(value)
        for key, value in wanted.items()
        if not _same(_find(content, key, file_name), plain(value))
    }


def _comments(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.lstrip().startswith("#")]


def _without_style(node: Any) -> Any:
    """Return lists and sections as plain ones, which are written in lines; a number stays as it is written (1.0e-3)."""
    if isinstance(node, dict):
        return {key: _without_style(value) for key, value in node.items()}
    return [_without_style(value) for value in node] if isinstance(node, list) else node


def _same(one: Any, other: Any) -> bool:
    """Return whether two values mean the same; true is not 1, and 1 is 1.0 (a number without a point is fine)."""
    return plain(one) == other and isinstance(one, bool) == isinstance(other, bool)


def _find(content: Any, key: str, file_name: str) -> Any:
    """Return a key's value.

    Raises:
        ParamsError: there is no such key.
    """
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            raise ParamsError(
                f"{file_name}: {key} is missing; every setting must be written out (git shows the default)."
            )
        content = content[part]
    return content


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        content = content[section]
    content[last] = value


def _one_line(value: Any) -> str:
    """Return a value as YAML on one line."""
    yaml = YAML()
    yaml.default_flow_style, yaml.width = True, 10**6
    stream = io.StringIO()
    yaml.dump([_without_style(value)], stream)
    return stream.getvalue().strip()[1:-1]
