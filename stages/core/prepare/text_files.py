"""Text of a file: decompressed, decoded as its byte order mark says, and in lines; nothing is guessed or repaired."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from stages.core.common.errors import ParamsError, StageError, shown

# UTF-32's mark begins with UTF-16's, so it comes first.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    b"\x84\x31\x95\x33": "gb18030",
}
# Magic bytes of other kinds of files that may have a text file's name.
OTHER_FILES = {
    b"\x1f\x8b": "gzip data, whose name ends in .gz",
    b"PK\x03\x04": "a ZIP archive (or a spreadsheet)",
    b"BZh91AY&SY": "bzip2 data",
    b"\xfd7zXZ\0": "xz data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"PAR1\x15": "Parquet data, whose name ends in .parquet",
    b"ARROW1\0\0": "Arrow data",
    b"SQLite format 3\0": "a database",
}
POINTERS = (b"version https://git-lfs.github.com/spec/", b"/annex/objects/")


def read_text(path: Path) -> str:
    """Return the text of a file that is one text; errors as of `tables.read_table`."""
    return decode(path, read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """Return what a file holds, decompressed."""
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ParamsError(f"{shown(path)} must be compressed by gzip. Received: {shown(error)}") from error
    except OSError as error:
        raise StageError(f"{shown(path)} cannot be read. Received: {error.strerror or shown(error)}") from error
    if data.startswith(POINTERS):
        raise ParamsError(
            f"{shown(path)} must hold the data. Received: a pointer to them. Run `git lfs pull` (or `git annex get`)."
        )
    return data


def format_of(path: Path) -> str:
    """Return the suffix that names a file's format, in lower case."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def decode(path: Path, data: bytes) -> str:
    """Return the text of a file without its byte order mark."""
    if other := next((what for begins, what in OTHER_FILES.items() if data.startswith(begins)), None):
        raise ParamsError(f"{shown(path)} must be text, as its name says. Received: {other}")
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    encoding = BYTE_ORDER_MARKS.get(mark, "utf-8")
    data = data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise ParamsError(
            f"{shown(path)} must be UTF-8 text, or UTF-16 or UTF-32 with a byte order mark. Received: {encoding} with "
            f"byte 0x{data[error.start]:02x} in line {line}"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ParamsError(
            f"{shown(path)} must be UTF-8 text, or UTF-16 or UTF-32 with a byte order mark. "
            f"Received: a NUL character in line {line}"
        )
    return text


def lines_of(text: str, end: str) -> Iterator[str]:
    """Yield the lines of a text, without line ends."""
    lines = text.split(end)
    yield from lines[:-1]
    if lines[-1]:
        yield lines[-1]


def plain_lines(text: str) -> Iterator[str]:
    """Yield the lines of a text without quoting, without line ends."""
    if "\n" not in text:
        return lines_of(text, "\r")
    return (line.removesuffix("\r") for line in lines_of(text, "\n"))
