"""Numbers of the report as text with units.

Purpose: one place that decides digits, units, signs and spaces.
"""

from __future__ import annotations

import math
from typing import Any

NONE = "\N{EN DASH}"
NBSP = "\N{NO-BREAK SPACE}"


def binary(size: float) -> str:
    """Return a size in bytes with a binary unit and three or four digits (1,073,741,824 is 1.00 GiB)."""
    if abs(size) < 1024:
        return f"{size:,.0f}{NBSP}B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        # 1023.6 would round to 1,024: that is 1.00 of the next unit.
        if abs(size) < 1023.5 or unit == "TiB":
            break
    return f"{_three_digits(size)}{NBSP}{unit}"


def duration(seconds: float) -> str:
    """Return a time in ms below a second, in s below two minutes, in min and s or h and min above."""
    if abs(seconds) < 1:
        return f"{_three_digits(seconds * 1000)}{NBSP}ms"
    if seconds < 120:
        return f"{_three_digits(seconds)}{NBSP}s"
    if seconds < 7200:
        return f"{int(seconds) // 60}{NBSP}min {int(seconds) % 60}{NBSP}s"
    return f"{int(seconds) // 3600:,}{NBSP}h {int(seconds) % 3600 // 60}{NBSP}min"


def percent(fraction: float) -> str:
    """Return a share of one in percent, with enough digits to distinguish small shares."""
    value = fraction * 100
    digits = 1 if abs(value) >= 1 or value == 0 else 2 if abs(value) >= 0.1 else 3
    return f"{value:.{digits}f}{NBSP}%"


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{digits}f}"


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, a true minus, and no sign on what rounds to zero."""
    text = f"{abs(value):,.{digits}f}"
    if not any(character in "123456789" for character in text):
        return text
    return ("+" if value > 0 else "\N{MINUS SIGN}") + text


def quantity(key: str, value: Any) -> str:
    """Return a metric as text; its unit follows from its key (`peak_host_bytes`, `step_seconds_median`, `loss`)."""
    if value is None:
        return NONE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    words = key.rpartition(".")[2].split("_")
    if "per_second" in key:
        return f"{_three_digits(value)}{NBSP}{words[0]}/s"
    if "bytes" in words:
        return binary(value)
    if "seconds" in words:
        return duration(value)
    if {"fraction", "accuracy", "share"} & set(words):
        return percent(value)
    if isinstance(value, int):
        return f"{value:,}"
    if {"loss", "perplexity"} & set(words):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.2f}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
