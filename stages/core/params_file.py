"""Changing values in `params.yaml` where they stand, so that comments and everything else stay to the byte.

Purpose: `python -m stages.profile`. ruamel.yaml says where a value begins and ends; only that is replaced.
Reads and writes nothing itself: from text to text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.core.errors import ParamsError
from stages.core.params import parse, plain

if TYPE_CHECKING:
    from ruamel.yaml.nodes import Node


class Change(NamedTuple):
    """A value that is replaced: its `section.key`, and both as they are written, on one line."""

    key: str
    old: str
    new: str


class Place(NamedTuple):
    """Where a value stands: from (after the key's colon, in a block) and to are offsets in the text."""

    after_key: int
    start: int
    end: int
    in_flow: bool


def rewrite(text: str, values: Mapping[str, str], file_name: str) -> tuple[str, list[Change]]:
    """Return the text with some values replaced, and what changed; a value that means the same stays as it is written.

    Args:
        text: of the settings file.
        values: YAML by `section.key`; one that begins with a line break is a block of lines below its key.
        file_name: for messages.

    Raises:
        ParamsError: a key is not there, or the file is written in a way that this cannot change.
    """
    content = parse(text, file_name)
    wanted = differing(content, values, file_name)
    if not wanted:
        return text, []
    line_end = "\r\n" if "\r\n" in text else "\n"
    new = {key: (values[key].strip(" ") or "null").replace("\n", line_end) for key in wanted}
    places = _places(text, list(wanted))
    changes = [
        Change(key, _one_line(text[places[key].start : places[key].end]) or "null", _one_line(new[key]))
        for key in wanted
    ]
    result = text
    for key in sorted(wanted, key=lambda key: places[key].start, reverse=True):
        result = _replaced(result, places[key], new[key])
    expected = plain(content)
    for key, value in wanted.items():
        _put(expected, key, value)
    # An alias, say, has its value elsewhere in the file.
    if plain(parse(result, file_name)) != expected:
        raise ParamsError(
            f"{file_name} is written in a way that cannot be changed in place. Received: {', '.join(wanted)}. "
            "Change these by hand, or start from git's version of the file."
        )
    return result, changes


def differing(content: Mapping[str, Any], values: Mapping[str, str], file_name: str) -> dict[str, Any]:
    """Return what those of some values mean that differ from the settings', as plain Python by key.

    Args:
        content: the sections, as parsed.
        values: YAML by `section.key`.
        file_name: for messages.

    Raises:
        ParamsError: a key is not there.
    """
    # One document for all: each by itself would be parsed ten times as slowly.
    lines = [f'"{key}":{"" if written.startswith(chr(10)) else " "}{written}' for key, written in values.items()]
    wanted = plain(parse("\n".join(lines), "a value")) if lines else {}
    return {key: value for key, value in wanted.items() if not _same(_find(content, key, file_name), value)}


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


def _places(text: str, keys: list[str]) -> dict[str, Place]:
    """Return where the values of keys stand, all of which are there."""
    from ruamel.yaml import YAML

    root = YAML().compose(text)
    found = {}
    for key in keys:
        node, in_flow = root, False
        for part in key.split("."):
            in_flow = in_flow or bool(node.flow_style)
            name, node = next(pair for pair in node.value if pair[0].value == part)
        colon = text.index(":", name.end_mark.index) + 1
        start, end = node.start_mark.index, _end(node)
        # No value at all is said to stand where the next one begins.
        found[key] = Place(colon, start, end, in_flow) if start < end else Place(colon, colon, colon, in_flow)
    return found


def _end(node: Node) -> int:
    """Return where a value ends: for a block its last line's end, where YAML itself counts the comments after it."""
    from ruamel.yaml.nodes import MappingNode, SequenceNode

    if isinstance(node, SequenceNode | MappingNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, MappingNode) else last)
    return node.end_mark.index


def _replaced(text: str, place: Place, written: str) -> str:
    """Return the text with one value replaced."""
    below = written[:1] in ("\r", "\n")
    if place.in_flow and below:
        items = [line.strip().removeprefix("- ") for line in written.strip().splitlines()]
        written, below = f"[{', '.join(items)}]", False
    on_the_key_s_line = place.start > place.after_key and "\n" not in text[place.after_key : place.start]
    if on_the_key_s_line and not below:
        return text[: place.start] + written + text[place.end :]
    # No value, or one in the lines below: what is new begins after the colon.
    return text[: place.after_key] + ("" if below else " ") + written + text[place.end :]


def _one_line(written: str) -> str:
    """Return a value as it is written, on one line; a list over several lines in brackets."""
    lines = [line.strip() for line in written.strip().splitlines()]
    if lines and lines[0].startswith("- "):
        return f"[{', '.join(line.removeprefix('- ') for line in lines)}]"
    return " ".join(lines)
