"""Lays out pairs of prompt and response, as token ids, in sequences of a fixed length; only responses are trained on.

Purpose: the arrays of `stages.core.tokenize.packing`, for instruct data. A sequence holds the prompt's tokens with
weight 0 and the response's, including `<end_of_turn>`, with weight 1. A pair is never split across sequences: a longer
one is truncated, and a pair whose prompt alone fills a sequence has no token to train on and is skipped. Both are
counted.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from stages.core.tokenize.packing import Sequences

Pair = Sequence[Sequence[int]]
"""Token ids of prompt (BOS first) and response; of a conversation any number of both in turn."""


def lay_out(pairs: Sequence[Pair], length: int, *, packing: bool, pad: int) -> Sequences:
    """Lay pairs out in sequences.

    A pair of p prompt and r response tokens takes p + r - 1 positions: its inputs are all tokens but the last, its
    targets all but the first, and a weight is 1 where the target is of a response.

    Args:
        pairs: each laid out as a whole.
        length: tokens per sequence, at least 1.
        packing: several pairs per sequence, in segments that do not attend to each other; else one, without
            `segment_ids` and `positions`.
        pad: id of unused positions.
    """
    rows = [row for row, (prompt, *_) in enumerate(pairs) if len(prompt) <= length]
    sizes = {row: min(_positions(pairs[row]), length) for row in rows}
    bins = _best_fit(sizes, length) if packing else [[row] for row in rows]
    shape = (len(bins), length)
    sequences = {
        "token_ids": np.full(shape, pad, np.int32),
        "target_ids": np.full(shape, pad, np.int32),
        "weights": np.zeros(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "review": np.full(shape, -1, np.int32),
    }
    for sequence, held in enumerate(bins):
        place = 0
        for segment, row in enumerate(held, start=1):
            ids, size = [token for turn in pairs[row] for token in turn], sizes[row]
            is_response = [place % 2 for place, turn in enumerate(pairs[row]) for _ in turn]
            part = sequence, slice(place, place + size)
            sequences["token_ids"][part] = ids[:size]
            sequences["target_ids"][part] = ids[1 : size + 1]
            sequences["weights"][part] = is_response[1 : size + 1]
            sequences["segment_ids"][part] = segment
            sequences["positions"][part] = np.arange(size)
            sequences["review"][part] = row
            place += size
    if not packing:
        del sequences["segment_ids"], sequences["positions"]
    return sequences


def _positions(pair: Pair) -> int:
    """Return how many positions a pair takes: its tokens, but for the last, which nothing follows."""
    return sum(map(len, pair)) - 1


def _best_fit(sizes: dict[int, int], length: int) -> list[list[int]]:
    """Return which items share a sequence: best-fit decreasing, each where it leaves the least room.

    Args:
        sizes: tokens of each item, at most `length`.
        length: tokens per sequence.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (what is left, number of the sequence), sorted
    for item in sorted(sizes, key=lambda item: -sizes[item]):
        found = bisect.bisect_left(rooms, (sizes[item], 0))
        room, number = rooms.pop(found) if found < len(rooms) else (length, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(item)
        bisect.insort(rooms, (room - sizes[item], number))
    return bins


def pair_metrics(sequences: Sequences, pairs: Sequence[Pair]) -> dict[str, int | float]:
    """Count the pairs' tokens; a pair of p prompt and r response tokens has p + r - 1 to be predicted.

    Returns:
        reviews (the pairs), sequences; response_tokens (trained on), tokens_kept (those and the
        prompts'), tokens_cut (discarded: beyond a sequence's end, or of a skipped pair), pairs_cut (whose response does
        not fit), prompts_too_long (skipped pairs); positions_padded (unused) and filled_fraction (used, of all).
    """
    filled = sequences["review"] >= 0
    kept = int(np.count_nonzero(filled))
    return {
        "reviews": len(pairs),
        "sequences": len(filled),
        "tokens_kept": kept,
        "response_tokens": int(np.count_nonzero(sequences["weights"])),
        "tokens_cut": sum(map(_positions, pairs)) - kept,
        "pairs_cut": sum(len(pair[0]) <= filled.shape[1] < _positions(pair) for pair in pairs),
        "prompts_too_long": len(pairs) - len(np.unique(sequences["review"][filled])),
        "positions_padded": int(filled.size) - kept,
        "filled_fraction": round(kept / filled.size, 6) if filled.size else 0.0,
    }
