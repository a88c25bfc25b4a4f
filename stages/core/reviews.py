"""Reviews as they come and as they are used: cleaning, and counting what is left out.

Purpose: nothing is dropped in silence, and no review stands in both the training and the held-out part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Label = int | str | None
HtmlBreaks = Literal["newline", "space", "keep"]

BREAK = re.compile(r"[ \t]*<br\s*/?>[ \t]*", re.IGNORECASE)
BREAKS = re.compile(r"\s*(?:<br\s*/?>\s*)+", re.IGNORECASE)


class RawReview(NamedTuple):
    """A review as its source has it: the text may be of any type where a file has an empty or odd cell."""

    text: Any
    label: Label
    id: str


class Review(NamedTuple):
    """A review that is used; the id names its source and its row there, from 0."""

    text: str
    label: Label
    id: str


@dataclass
class Tally:
    """How many reviews were read, and how many were left out for what reason (the first that applies)."""

    read: int = 0
    empty: int = 0
    too_short: int = 0
    duplicates: int = 0


def clean_text(text: str, html_breaks: HtmlBreaks) -> str:
    r"""Return a review's text with its HTML breaks replaced.

    Args:
        text: as the source has it.
        html_breaks: `newline` (each break becomes `\n`), `space` (a run of breaks becomes one space), or `keep` (the
            text is not touched at all, as in the tutorial).
    """
    if html_breaks == "newline":
        return BREAK.sub("\n", text).strip()
    if html_breaks == "space":
        return BREAKS.sub(" ", text).strip()
    return text


def clean(
    raw: Iterable[RawReview], html_breaks: HtmlBreaks, min_characters: int, seen: set[str], tally: Tally
) -> Iterator[Review]:
    """Yield the reviews that are used, in order, and count the others.

    Args:
        raw: reviews as their source has them; read only as far as the caller goes.
        html_breaks: see `clean_text`.
        min_characters: shorter texts, white space at the ends not counted, are left out.
        seen: texts that are used already, here or in another part; those yielded are added.
        tally: counts, added to.
    """
    for review in raw:
        tally.read += 1
        if not isinstance(review.text, str) or not review.text.strip():
            tally.empty += 1
            continue
        text = clean_text(review.text, html_breaks)
        length = len(text.strip())
        if length < min_characters:
            # A text of nothing but breaks is as good as none.
            if length:
                tally.too_short += 1
            else:
                tally.empty += 1
        elif text in seen:
            tally.duplicates += 1
        else:
            seen.add(text)
            yield Review(text, review.label, review.id)
