"""Sizes in bytes as text: decimal units for files and disks, binary ones for memory."""

from __future__ import annotations

GIB = 2**30


def megabytes(size: int, digits: int = 0) -> str:
    """Return a file's size, such as 1,234 MB."""
    return f"{size / 1e6:,.{digits}f} MB"


def gibibytes(size: float) -> str:
    """Return an amount of memory, such as 15.75 GiB."""
    return f"{size / GIB:.2f} GiB"
