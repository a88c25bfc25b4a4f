"""Reviews, or pairs of prompt and response, raw and cleaned, with counts of what is left out.

Purpose: nothing is dropped silently, and no review is in both the training and the held-out part. A pair is a
review with a prompt: its text is the response.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Label = int | str | None
HtmlBreaks = Literal["newline", "space", "keep"]
Duplicates = Literal["drop", "keep"]

BREAK = re.compile(r"[ \t]*<br\s*/?>[ \t]*", re.IGNORECASE)
BREAKS = re.compile(r"\s*(?:<br\s*/?>\s*)+", re.IGNORECASE)


class RawReview(NamedTuple):
    """A review as its source has it; a missing text or prompt is None.

    The prompt counts only where `is_pair` says so: a pair's cell may be empty too. `earlier` are the turns of a
    conversation before its last prompt, prompts and responses in turn, `system` what a system said before all of them.
    `other` marks a conversation of another order.
    """

    text: str | None
    label: Label
    id: str
    prompt: str | None = None
    is_pair: bool = False
    other: bool = False
    earlier: tuple[str | None, ...] = ()
    system: str | None = None


class Review(NamedTuple):
    """A review that is used; the id names its source and its row there, from 0. Only a pair has a prompt.

    `earlier` are the turns of a conversation before its last prompt, prompts and responses in turn, `system` what a
    system said before all of them.
    """

    text: str
    label: Label
    id: str
    prompt: str | None = None
    earlier: tuple[str, ...] = ()
    system: str | None = None

    @property
    def content(self) -> tuple[str, ...]:
        """What must not occur twice: all that is said, so that a prompt may have several responses."""
        return (*([self.system] if self.system else []), *self.earlier, self.prompt or "", self.text)


@dataclass
class Tally:
    """How many reviews were read, and how many were left out for what reason (the first that applies).

    `changed` counts those that are used with other characters than their source has.
    """

    read: int = 0
    empty: int = 0
    too_short: int = 0
    duplicates: int = 0
    other_conversations: int = 0
    changed: int = 0


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
    raw: Iterable[RawReview],
    html_breaks: HtmlBreaks,
    min_characters: int,
    duplicates: Duplicates,
    seen: set[tuple[str, ...]],
    tally: Tally,
) -> Iterator[Review]:
    """Yield the reviews that are used, in order, and count the others.

    Args:
        raw: reviews as their source has them; read only as far as the caller goes.
        html_breaks: see `clean_text`; of a pair it applies to prompt and response, of a conversation to all turns.
        min_characters: shorter texts, white space at the ends not counted, are left out; of a pair or conversation the
            characters of all turns are counted together.
        duplicates: `drop`: of several with the same content the first is used; `keep`: all are.
        seen: the `content` of those that must not be used, being in another part; with `drop` those yielded are added.
        tally: counts, added to. A pair without a prompt or without a response is empty, a conversation without any.
    """
    for review in raw:
        tally.read += 1
        if review.other:
            tally.other_conversations += 1
            continue
        raw_parts = [*review.earlier, review.prompt, review.text] if review.is_pair else [review.text]
        parts = [clean_text(part or "", html_breaks) for part in raw_parts]
        lengths = [len(part.strip()) for part in parts]
        prompt = parts[-2] if review.is_pair else None
        # A conversation without what a system says is whole.
        system = clean_text(review.system or "", html_breaks).strip()
        used = Review(parts[-1], review.label, review.id, prompt, tuple(parts[:-2]), system or None)
        # A text of breaks only is empty.
        if not all(lengths):
            tally.empty += 1
        elif sum(lengths) + len(system) < min_characters:
            tally.too_short += 1
        elif used.content in seen:
            tally.duplicates += 1
        else:
            if duplicates == "drop":
                seen.add(used.content)
            tally.changed += [system, *parts] != [review.system or "", *raw_parts]
            yield used
