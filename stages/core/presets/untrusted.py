"""Reads files of an untrusted preset: JSON, typed and bounded, and texts made safe to show.

Purpose: a number is checked before anything is allocated by it, and a text is escaped before it is shown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.core.common.errors import StageError, shown

# Far above any Gemma, and low enough that no table over layers or rows of a malformed preset fills the memory.
Layers = Annotated[int, Field(ge=1, le=512)]
Heads = Annotated[int, Field(ge=1, le=1024)]
HeadSize = Annotated[int, Field(ge=2, le=4096, multiple_of=2)]  # rotary embeddings turn pairs
Count = Annotated[int, Field(ge=0, le=512)]  # of blocks
InputSize = Annotated[int, Field(ge=0, le=4096)]
Size = Annotated[int, Field(ge=1, le=1 << 22)]
Positive = Annotated[float, Field(gt=0, le=1e9)]

LARGEST_JSON = 64 << 20
"""Bytes of a configuration or index; those of the public presets have at most some 100,000."""


class Typed(BaseModel):
    """A part of a configuration in which every key is known and has the type that it must have."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


T = TypeVar("T", bound=BaseModel)


def parse(schema: type[T], content: Any, what: str) -> T:
    """Return a part of a configuration as its schema.

    Raises:
        StageError: a key is unknown, missing, or has another type or size; names it.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "content"
        if first["type"] == "extra_forbidden":
            raise StageError(
                f"{what} has a key that this project does not know, so that it might compute something else. "
                f"Received: {key}={brief(first['input'])}."
            ) from error
        if first["type"] == "missing":
            raise StageError(f"{what} must state {key}, and does not.") from error
        said = first["msg"].removeprefix("Input ")
        raise StageError(f"{what}: {key} {said}. Received: {key}={brief(first['input'])}.") from error


def brief(value: Any) -> str:
    """Return an untrusted value for a message: at most 80 characters, none of them a control character."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.10g}" if abs(value) < 1e300 else "a number without end"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file of a preset holds.

    Raises:
        StageError: it cannot be read, is no object, or has a key twice.
    """
    refuse_pointer(path)
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise StageError(f"{path} must be JSON that can be read. Received: {shown(error)}") from error
    return parse_object(content, str(path))


def parse_object(content: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object that a text in UTF-8 is; `what` names it in messages.

    Raises:
        StageError: it is no object, or has a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(content := dict(pairs)) != len(pairs):
            raise ValueError("a key is there twice")
        return content

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        read = json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise StageError(f"{what} must be JSON that can be read. Received: {shown(error)}") from error
    if not isinstance(read, dict):
        raise StageError(f"{what} must be a JSON object. Received: {type(read).__name__}")
    return read


def refuse_pointer(path: Path) -> None:
    """Refuse a file that is only a pointer to its content, or that cannot be read.

    Raises:
        StageError: says how to download the content.
    """
    try:
        with path.open("rb") as stream:
            begins = stream.read(64)
    except OSError as error:
        raise StageError(
            f"Every file of a preset must be readable. Received: {shown(path)} ({error.strerror})\n"
            "Mend its permissions, or put the file there."
        ) from error
    if begins.startswith(b"version https://git-lfs.github.com/spec/"):
        raise StageError(
            f"{path} must be the file itself. Received: a Git LFS pointer to it\n"
            "Run `git lfs install` and `git lfs pull` where it was cloned, or download it again."
        )
