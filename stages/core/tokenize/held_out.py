"""Held-out sequences, whole: what `evaluate` measures, independent of how `tokenize` cuts and packs for training.

Reads: `data/tokens/held_out.npz` (written through `store.write_sequences`), whose arrays are
    token_ids  int32 (tokens,)         the tokens of all sequences, one sequence after another, each with its BOS first
    is_target  bool (tokens,)          true where the token is predicted and measured: of a review all but BOS, of a
                                       pair of prompt and response the response's, of a conversation every response's
    offsets    int64 (sequences + 1,)  where each sequence begins in these two, and where the last one ends
A sequence's number is its row in `data/imdb/validation.parquet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

HeldOut = dict[str, np.ndarray]


def of_reviews(reviews: Sequence[Sequence[int]], *, bos: int, eos: int | None) -> HeldOut:
    """Return reviews as whole sequences.

    Args:
        reviews: token ids of each, without BOS and EOS.
        bos: id put first in each.
        eos: id that ends each; None for no such token.
    """
    ending = [] if eos is None else [eos]
    return of_pairs([([bos], [*review, *ending]) for review in reviews])


def of_pairs(pairs: Sequence[Sequence[Sequence[int]]]) -> HeldOut:
    """Return pairs as whole sequences.

    Args:
        pairs: token ids of prompt (BOS first) and response; of a conversation any number of both in turn.
    """
    turns = [turn for pair in pairs for turn in pair]
    is_response = [bool(place % 2) for pair in pairs for place in range(len(pair))]
    return {
        "token_ids": np.array([token for turn in turns for token in turn], np.int32),
        "is_target": np.repeat(np.array(is_response, bool), [len(turn) for turn in turns]),
        "offsets": np.cumsum([0, *(sum(map(len, pair)) for pair in pairs)], dtype=np.int64),
    }


def read_held_out(path: Path) -> HeldOut:
    """Return the arrays of `data/tokens/held_out.npz`."""
    with np.load(path) as file:
        return {name: file[name] for name in ("token_ids", "is_target", "offsets")}
