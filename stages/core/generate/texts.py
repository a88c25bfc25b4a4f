"""Texts of rows as their tokens come: decoded, cut at stop strings, and shown in order.

Purpose: text appears as it is written, without anything that a terminal obeys, and what appears is what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stages.core.presets.tokenizer import Tokenizer

# Called with a row's number, what to add to its text, and whether that is the end of it.
Show = Callable[[int, str, bool], None]
# Of what is not printable, what belongs to words and emoji (joiners, a space that does not break) and to layout.
HARMLESS = "\n\t\u200c\u200d\u00a0"


class Texts:
    """A `Listener` that decodes the tokens of rows.

    Attributes:
        texts: of each row, up to and without the first stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, rows: int, stop_strings: Sequence[str] = (), show: Show | None = None
    ) -> None:
        """Begin with empty texts.

        Args:
            tokenizer: of the preset.
            rows: number of rows.
            stop_strings: each ends a text where it first occurs.
            show: called with each row's text as it grows; what may turn out to be another character, or the start of
                a stop string, is held back until that is known.
        """
        self.texts = [""] * rows
        self._tokenizer = tokenizer
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._stops = tuple(stop_strings)
        self._show = show

    def __call__(self, row: int, new: list[int], ended: bool) -> bool:
        """Add tokens to a row, and return whether its text has met a stop string."""
        self._ids[row] += new
        whole, before = self._tokenizer.decode(self._ids[row]), self.texts[row]
        found = [place for stop in self._stops if (place := whole.find(stop)) >= 0]
        text = whole[: min(found)] if found else whole if ended else self._certain(whole)
        self.texts[row] = text
        if self._show is not None:
            self._show(row, text[len(before) :], ended or bool(found))
        return bool(found)

    def _certain(self, text: str) -> str:
        """Return a text without an end that further tokens may change."""
        # The bytes of one character can be tokens of their own; until the last one they decode to U+FFFD.
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        begun = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return text[: len(text) - max(begun, default=0)]


class InOrder:
    """A `Show` that writes texts one after the other, though they grow together."""

    def __init__(self, headings: Sequence[str], write: Callable[[str], None]) -> None:
        """Write the first heading.

        Args:
            headings: of each row, before its text.
            write: puts out a piece of text; it is given what `visible` returns.
        """
        self._headings, self._write = headings, write
        self._waiting = [""] * len(headings)
        self._ended = [False] * len(headings)
        self._at = 0
        self._write(visible(headings[0]))

    def __call__(self, row: int, text: str, ended: bool) -> None:
        """Add to a row, and write what is next."""
        self._waiting[row] += text
        self._ended[row] = ended
        while self._at < len(self._headings):
            self._write(visible(self._waiting[self._at]))
            self._waiting[self._at] = ""
            if not self._ended[self._at]:
                return
            self._at += 1
            following = self._headings[self._at] if self._at < len(self._headings) else ""
            self._write(f"\n\n{visible(following)}")


def visible(text: str) -> str:
    """Return a text for a terminal: lines stay, other control characters are escaped.

    Example:
        >>> visible("one\\x1b[2J")
        'one\\\\x1b[2J'
    """
    return "".join(each if each.isprintable() or each in HARMLESS else ascii(each)[1:-1] for each in text)
