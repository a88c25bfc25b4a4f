"""Texts that spell control tokens, such as `<end_of_turn>` or `<start_of_image>`: text, or the tokens themselves.

Purpose: the same for every preset. Some vocabularies find such words in any text and others do not, which would decide
in silence whether a text can end a turn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from stages.core.presets.tokenizer import Tokenizer

# Names that no ordinary text contains by chance; not markup such as <table>, which Gemma's vocabularies have too.
NAMES = re.compile(
    r"<(?:pad|eos|bos|unk|mask|unused\d+|(?:start|end)_of_\w+|\w+_soft_token)>|\[(?:multimodal|@BOS@)\]"
    # Gemma 4's, with the vertical bars part of them.
    r"|<\|[a-z_]+\|?>|<[a-z_]+\|>|<\|\"\|>"
)
# A text without one of these spells none, and the vocabulary's 262,144 pieces need not be searched for names.
BEGINNINGS = frozenset("<[")


class ControlTokens:
    """The control tokens of a vocabulary, and texts as ids with a rule for them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the vocabulary; it is searched for control tokens when a text may spell one."""
        self._tokenizer = tokenizer

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        """The control tokens by name: their type differs from format to format."""
        return {piece: number for piece, number in self._tokenizer.pieces() if NAMES.fullmatch(piece)}

    @functools.cached_property
    def _names(self) -> list[str]:
        return sorted(self._ids, key=len, reverse=True)

    @functools.cached_property
    def _spelled(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, self._names))})" if self._names else "(?!)")

    @functools.cached_property
    def _within(self) -> re.Pattern[str]:
        """Where to divide a text so that no part spells one: after the first character, overlapping ones too."""
        insides = (f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in self._names)
        return re.compile("|".join(insides) if self._names else "(?!)")

    def _spells(self, text: str) -> bool:
        """Return whether a text spells a control token."""
        return not BEGINNINGS.isdisjoint(text) and self._spelled.search(text) is not None

    def spelled_in(self, texts: Sequence[str]) -> int:
        """Return how many of the texts spell a control token."""
        return sum(map(self._spells, texts))

    def as_text(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, none of them a control token: what spells one is encoded letter by letter."""
        # SentencePiece sees no more than one part of a text that is divided.
        parts = [self._within.split(text) if self._spells(text) else [text] for text in texts]
        encoded = iter(self._tokenizer.encode_all([part for each in parts for part in each]))
        return [[number for _ in each for number in next(encoded)] for each in parts]

    def as_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, each control token that is spelled taken as that one token."""
        parts = [self._spelled.split(text) if self._spells(text) else [text] for text in texts]
        encoded = iter(self._tokenizer.encode_all([part for each in parts for part in each]))
        ids = [[(part, next(encoded)) for part in each] for each in parts]
        return [[number for part, found in each for number in self._token(part, found)] for each in ids]

    def _token(self, part: str, ids: list[int]) -> list[int]:
        """Return the id of the control token that a part spells, or the ids of one that spells none."""
        return [self._ids[part]] if part[:1] in BEGINNINGS and part in self._ids else ids
