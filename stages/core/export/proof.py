"""The proof that what was written computes what the tuned model computes: logits on a text that is hard to get right.

Purpose: exports of Gemma fail without a message: a scrambled projection, a lost adapter, a dropped window still write
text. So each is read back by the project's own reader and run, block by block: no more than a block's weights are in
memory, whatever the size of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stages.core.export.tuned import pieces
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import WeightSource
from stages.core.presets.tokenizer import Tokenizer
from stages.core.quantize import by_blocks
from stages.core.records.layout import LoraConfig
from stages.core.tokenize.control_tokens import NAMES

BEYOND = 64
"""Tokens of the text beyond a sliding window."""
COMPARED = 128
"""Positions at the end of the text whose logits are compared: before and after the first window ends."""

TEXT = (
    "The film isn't \N{LEFT DOUBLE QUOTATION MARK}good\N{RIGHT DOUBLE QUOTATION MARK}: 10/10, 3.14159 or 1,000,000?  "
    "two  spaces,   three,     five"
    + " "
    * 40
    + "forty\ttab\t\ttabs\r\ncarriage\n\n\n\nfour lines\x0b\x0c\x07\x1b\x7f "
    "\N{GRINNING FACE}\N{POPCORN}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}\N{THUMBS UP SIGN}"
    "\N{EMOJI MODIFIER FITZPATRICK TYPE-5}\N{REGIONAL INDICATOR SYMBOL LETTER D}"
    "\N{REGIONAL INDICATOR SYMBOL LETTER E} caf\N{LATIN SMALL LETTER E WITH ACUTE} cafe\N{COMBINING ACUTE ACCENT} "
    "\N{CYRILLIC CAPITAL LETTER EF}\N{CYRILLIC SMALL LETTER I}\N{CYRILLIC SMALL LETTER EL} "
    "\N{CJK UNIFIED IDEOGRAPH-6620}\N{CJK UNIFIED IDEOGRAPH-753B}\N{HIRAGANA LETTER NO} "
    "\N{ARABIC LETTER FEH}\N{ARABIC LETTER YEH}\N{ARABIC LETTER LAM}\N{ARABIC LETTER MEEM} \N{DEVANAGARI LETTER KA}"
    "\N{DEVANAGARI VOWEL SIGN I} \N{ZERO WIDTH NO-BREAK SPACE}\N{ZERO WIDTH SPACE}\N{NO-BREAK SPACE}"
    "\N{LINE SEPARATOR}\N{LOWER ONE EIGHTH BLOCK}\N{LOWER ONE EIGHTH BLOCK}x \N{GOTHIC LETTER AHSA}\U0010fffd "
    "<start_of_turn>user\nIs <b>this</b> <br />a <table><tr> of <0x41> ##tags?<end_of_turn>\n<start_of_turn>model\n"
    "<bos> <eos><pad><unk> <unused7>[multimodal] <start_of_turn <end_of_turn>> naïvely, supercalifragilistic, "
    "def f(x): return {'a': [x ** 2, -1e-3]}  # \\n \\u00e9 &amp; https://example.org/a?b=c#d @user "
)
"""Runs of spaces and lines, tabs, control characters, emoji of several code points, accents of both forms, six scripts,
what is no character of any, Gemma's control tokens spelled out, mark-up and code."""


def text_ids(tokenizer: Tokenizer, architecture: Architecture, text: str = TEXT) -> list[int]:
    """Return the ids of a text, from BOS on: once, or as often as it takes to go beyond a sliding window."""
    # As `ControlTokens.as_tokens`, which looks for thousands of names where there are few.
    found = {name: tokenizer.piece_id(name) for name in NAMES.findall(text)}
    names = {name: number for name, number in sorted(found.items()) if number is not None}
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
    encoded = zip(parts, tokenizer.encode_all(parts), strict=True)
    once = [number for part, ids in encoded for number in ([names[part]] if part in names else ids)]
    window = architecture.config.get("sliding_window_size", 0)
    if not architecture.config.get("use_sliding_window_attention"):
        window = 0
    length = max(len(once), window + BEYOND)
    return again([tokenizer.bos, *once], length)


def again(ids: list[int], length: int) -> list[int]:
    """Return this number of ids: BOS, which is the first one, then the others over and over."""
    return [ids[0], *(ids[1:] * (length // (len(ids) - 1) + 1))[: length - 1]]


class Logits(Protocol):
    """Anything that gives the logits of the last positions, for some rows of the table."""

    def logits(self, rows: slice) -> np.ndarray:
        """Return float32 (positions, rows)."""


@dataclass(frozen=True)
class Reading:
    """What a model makes of the text.

    Attributes:
        hidden: float32 (positions, hidden), the final hidden states of the last positions.
        table: returns rows of the embedding table, float32.
        soft_cap: of the logits.
    """

    hidden: np.ndarray
    table: Callable[[slice], np.ndarray]
    soft_cap: float | None

    def logits(self, rows: slice) -> np.ndarray:
        """Return the logits (positions, rows) of some rows of the table."""
        z = self.hidden @ self.table(rows).T
        return z if self.soft_cap is None else self.soft_cap * np.tanh(z / self.soft_cap)


def read(architecture: Architecture, weights: WeightSource, ids: list[int], lora: LoraConfig | None = None) -> Reading:
    """Run a model on the text, in float32 on one device, a block's weights at a time.

    Args:
        architecture: of the model.
        weights: its weights by keras-hub's paths, which must stay open for the reading's table.
        ids: of the text.
        lora: of an adapter whose kernels are among the weights; None for none.
    """
    hidden_size = architecture.config["hidden_dim"]

    def table(rows: slice) -> np.ndarray:
        return weights.read(by_blocks.TABLE, (rows, slice(0, hidden_size))).astype(np.float32, copy=False)

    one = np.array([ids], np.int32)
    hidden = by_blocks.hidden_states(architecture, weights, one, np.ones_like(one), lora=lora)
    return Reading(np.asarray(hidden[0, -COMPARED:]), table, architecture.config.get("final_logit_soft_cap"))


@dataclass(frozen=True)
class Difference:
    """Two models' logits on the same text.

    Attributes:
        largest: difference of two logits of one token at one position.
        range: between the largest and the smallest logit of the first model.
        same_choice: fraction of the positions at which both find the same token likeliest.
    """

    largest: float
    range: float
    same_choice: float


def difference(one: Reading, other: Logits, vocabulary: int) -> Difference:
    """Compare all logits of both readings, some rows of the table at a time.

    A NaN anywhere makes the largest difference a NaN.
    """
    positions = np.arange(len(one.hidden))
    largest, low, high = np.float32(0), np.inf, -np.inf
    best = np.full((2, len(positions)), -np.inf)
    choice = np.zeros((2, len(positions)), np.int64)
    for rows in pieces((vocabulary, one.hidden.shape[1])):
        both = [one.logits(rows), other.logits(rows)]
        largest = np.maximum(largest, np.abs(both[0] - both[1]).max())
        low, high = min(low, both[0].min()), max(high, both[0].max())
        for number, z in enumerate(both):
            place = z.argmax(axis=1)
            better = z[positions, place] > best[number]
            best[number, better] = z[positions, place][better]
            choice[number, better] = place[better] + rows.start
    return Difference(float(largest), float(high - low), float((choice[0] == choice[1]).mean()))
