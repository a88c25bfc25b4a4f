"""Reading `params.yaml`: text, overrides and the schema, with errors that name the key, what is allowed and the line.

Reads: `params.yaml`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML, YAMLError

from stages.core.common.errors import ParamsError, shown
from stages.core.config.schema import Params
from stages.core.config.section import Section

# Far more than there are settings: YAML aliases can expand a short text without bound.
MOST_VALUES = 10_000
# The section whose keys are no settings.
NAMED_BY_THE_USER = ("variants",)


def read_params(path: Path, overrides: tuple[str, ...] = ()) -> Params:
    """Read and check the whole of `params.yaml`.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings, the value in YAML; they win over the file.

    Raises:
        ParamsError: one line for each mistake: key, what is allowed, the value received, and the line in the file.
    """
    return check_params(read_text(path), path.name, overrides)


def read_text(path: Path) -> str:
    """Return the text of `params.yaml`.

    Raises:
        ParamsError: no such file, or no UTF-8.
    """
    if not path.is_file():
        raise ParamsError(
            f"The settings file does not exist. Received: path={path}. Run this in the repository's folder."
        )
    try:
        # Line endings as they are: what rewrites the file must not change them.
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path.name} must be UTF-8 text: {error}") from error


def parse(text: str, file_name: str) -> dict:
    """Return the sections of `params.yaml`, with ruamel's containers that know their lines; nothing in them is checked.

    Raises:
        ParamsError: not YAML, or no sections.
    """
    content = _load(YAML(), text, f"{file_name} is not valid YAML")
    if not isinstance(content, dict):
        raise ParamsError(f"{file_name} must hold sections such as `finetune:`. Received: {type(content).__name__}")
    return content


def check_params(text: str, file_name: str, overrides: tuple[str, ...] = ()) -> Params:
    """Check the text of `params.yaml`; arguments and errors as for `read_params`."""
    content = parse(text, file_name)
    overridden = set()
    for override in overrides:
        overridden.add(apply_override(content, override))
    try:
        return Params.model_validate(plain(content))
    except ValidationError as error:
        lines = [_describe(problem, content, file_name, overridden) for problem in error.errors()]
        raise ParamsError("\n".join(dict.fromkeys(lines))) from error


def apply_override(content: dict, override: str) -> tuple[str, ...]:
    """Set one `section.key=value` in place and return its key as a tuple."""
    name, equals, text = override.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys):
        raise ParamsError(f"--set takes section.key=value. Received: --set {override}")
    value = _load(YAML(typ="safe", pure=True), text, f"--set takes a YAML value. Received: --set {shown(override)}")
    target = content
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(target.get(key) if isinstance(target, dict) else None, dict):
            raise ParamsError(
                f"--set: {'.'.join(keys[: depth + 1])} is not a section of the settings.{_nearest(key, target)}"
            )
        target = target[key]
    if keys[-1] not in target and keys[:-1] != NAMED_BY_THE_USER:
        raise ParamsError(f"--set: {name} is not a key of the settings.{_nearest(keys[-1], target)}")
    target[keys[-1]] = value
    return keys


def plain(node: Any) -> Any:
    """Return ruamel's round-trip containers and scalars as plain Python ones.

    Raises:
        ParamsError: more than `MOST_VALUES`, as in a list that contains itself, or nested too deeply.
    """
    left = MOST_VALUES

    def copied(node: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ParamsError(
                f"The settings must have at most {MOST_VALUES:,} values. Received: more, or a list in itself"
            )
        if isinstance(node, dict):
            return {str(key): copied(value) for key, value in node.items()}
        if isinstance(node, list):
            return [copied(value) for value in node]
        for kind in (bool, int, float, str):
            if isinstance(node, kind):
                return kind(node)
        return node

    try:
        return copied(node)
    except RecursionError as error:
        raise ParamsError("The settings must not be nested so deeply. Received: a list or section in itself") from error


def _load(yaml: Any, text: str, wrong: str) -> Any:
    """Return what a YAML text holds; `wrong` is the error for an empty one."""
    try:
        return yaml.load(text)
    # In addition to its own errors ruamel raises those of the numbers, dates and keys that it makes.
    except (YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        detail = shown(" ".join(str(error).split()) or type(error).__name__)
        raise ParamsError(f"{wrong}: {detail}" if isinstance(error, YAMLError | ValueError) else wrong) from error


def _spelled(value: Any) -> str:
    """Return a value as Python writes it, bounded; a number with too many digits in words."""
    try:
        return shown(repr(value))
    except ValueError:
        return "a number of more than 4,300 digits"


def _nearest(key: str, choices: Any) -> str:
    """Return ` Did you mean X?` for the nearest of some keys, or nothing."""
    matches = difflib.get_close_matches(str(key), [str(choice) for choice in choices], n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


def _describe(problem: Any, content: dict, file_name: str, overridden: set[tuple[str, ...]]) -> str:
    """Return one line for one pydantic problem: the place, the key, what is allowed, what was received."""
    # A union's branches appear in the location by their type's name; the file knows only keys and indices.
    node: Any = content
    location: list[str | int] = []
    for part in problem["loc"]:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            node = node[part]
            location.append(part)
        elif problem["type"] in ("missing", "extra_forbidden"):
            location.append(part)
    name = ".".join(str(part) for part in location)
    # A value of the option may be a list, of which an entry is wrong.
    by_option = any(tuple(location[: len(option)]) == option for option in overridden)
    place = "--set" if by_option else f"{file_name}:{_line(content, location)}"
    if problem["type"] == "extra_forbidden":
        parent: type[BaseModel] = Params
        for part in location[:-1]:
            if isinstance(part, str):
                parent = _section_in(parent.model_fields[part].annotation) or parent
        known = list(parent.model_fields)
        return (
            f"{place}: {name} is not a setting.{_nearest(str(location[-1]), known)} Allowed here: {', '.join(known)}."
        )
    if problem["type"] == "missing":
        return f"{place}: {name} is missing; every setting must be written out (git shows the default)."
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if problem["type"] == "value_error" and not location:
        # Of several sections: the message names its keys in full, the one to change first.
        named = {key: _at(content, key) for key in re.findall(r"\b[a-z_]+(?:\.\w+)+", message)}
        received = ", ".join(f"{key}={_spelled(value)}" for key, value in named.items())
        keys = [int(part) if part.isdigit() else part for part in next(iter(named)).split(".")]
        by_option = any(tuple(key.split("."))[: len(option)] == option for key in named for option in overridden)
        place = "--set" if by_option else f"{file_name}:{_line(content, keys)}"
        return f"{place}: {message}. Received: {received}"
    if problem["type"] == "value_error":
        message = f"{name}.{message}"
        return f"{place}: {message}. Received: {_flat(plain(node), message)}"
    return f"{place}: {name} {message[0].lower() + message[1:]}. Received: {name}={_spelled(plain(node))}"


def _at(content: Any, key: str) -> Any:
    """Return the plain value at a dotted key."""
    for part in key.split("."):
        content = content[int(part) if part.isdigit() else part]
    return plain(content)


def _section_in(annotation: Any) -> type[Section] | None:
    """Return the section type within `list[Rule] | None` and the like, or None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for each in get_args(annotation) if (found := _section_in(each))), None)


def _flat(values: Any, message: str) -> str:
    """Return a section's values on one line: those of the keys that the message names, or all if it names none."""
    if isinstance(values, dict):
        named = {key: value for key, value in values.items() if re.search(rf"\b{re.escape(key)}\b", message)}
        return ", ".join(f"{key}={_spelled(value)}" for key, value in (named or values).items())
    return _spelled(values)


def _line(content: Any, location: Sequence[str | int]) -> int:
    """Return the line (from 1) of a key, or of the nearest section around it."""
    line = 1
    node: Any = content
    for part in location:
        position: Any = getattr(node, "lc", None)
        # Only what ruamel read from a file knows its lines: its sections and lists.
        if position is None or (isinstance(node, dict) and part not in node):
            break
        found = position.data.get(part) if position.data else None
        if found:
            line = found[0] + 1
        node = node[part]
    return line
