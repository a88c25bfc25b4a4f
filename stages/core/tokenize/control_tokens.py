"""Texts that spell control tokens, such as `<end_of_turn>` or `<start_of_image>`: text, or the tokens themselves.

Purpose: the same for every preset. Some vocabularies find such words in any text and others do not, which would decide
in silence whether a text can end a turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.core.presets.tokenizer import Tokenizer

# What no text of people's has by chance and is no markup of theirs, as <table> is, which Gemma's vocabularies have too.
NAMES = re.compile(
    r"<(?:pad|eos|bos|unk|mask|unused\d+|(?:start|end)_of_\w+|\w+_soft_token)>|\[(?:multimodal|@BOS@)\]"
    # Gemma 4's, with the vertical bars part of them.
    r"|<\|[a-z_]+\|?>|<[a-z_]+\|>|<\|\"\|>"
)


class ControlTokens:
    """The control tokens of a vocabulary, and texts as ids with a rule for them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look up which pieces are control tokens, by name: their type differs from format to format."""
        self._tokenizer = tokenizer
        self._ids = {piece: number for piece, number in tokenizer.pieces() if NAMES.fullmatch(piece)}
        names = sorted(self._ids, key=len, reverse=True)
        self._spelled = re.compile(f"({'|'.join(map(re.escape, names))})" if names else "(?!)")
        # Where to divide a text so that no part spells one: after the first character, overlapping ones too.
        insides = (f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names)
        self._within = re.compile("|".join(insides) if names else "(?!)")

    def spelled_in(self, texts: Sequence[str]) -> int:
        """Return how many of the texts spell a control token."""
        return sum(self._spelled.search(text) is not None for text in texts)

    def as_text(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, none of them a control token: what spells one is encoded letter by letter."""
        # SentencePiece sees no more than one part of a text that is divided.
        parts = [self._within.split(text) if self._spelled.search(text) else [text] for text in texts]
        encoded = iter(self._tokenizer.encode_all([part for each in parts for part in each]))
        return [[number for _ in each for number in next(encoded)] for each in parts]

    def as_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, each control token that is spelled taken as that one token."""
        parts = [self._spelled.split(text) for text in texts]
        encoded = iter(self._tokenizer.encode_all([part for each in parts for part in each]))
        ids = [[(part, next(encoded)) for part in each] for each in parts]
        return [[number for part, found in each for number in self._token(part, found)] for each in ids]

    def _token(self, part: str, ids: list[int]) -> list[int]:
        """Return the id of the control token that a part spells, or the ids of one that spells none."""
        return [self._ids[part]] if part in self._ids else ids
