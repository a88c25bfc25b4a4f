"""Pairs of prompt and response, as token ids, into windows of a fixed length: whole, and only the response is learnt.

Purpose: the arrays of `stages.core.tokenize.packing`, for instruct data. A window holds the prompt's tokens with weight
0 and the response's, `<end_of_turn>` among them, with weight 1. A pair is never divided over windows; what is longer
than one is cut at its end, and a pair whose prompt alone fills a window has nothing to learn and is left out. Both are
counted.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from stages.core.tokenize.packing import Windows

Pair = Sequence[Sequence[int]]
"""Token ids of prompt (BOS first) and response; of a conversation any number of both in turn."""


def lay_out(pairs: Sequence[Pair], length: int, *, packing: bool, pad: int) -> Windows:
    """Lay pairs into windows.

    A pair of p prompt and r response tokens takes p + r - 1 positions: its inputs are all tokens but the last, its
    targets all but the first, and a weight is 1 where the target is of a response.

    Args:
        pairs: each laid out as a whole.
        length: tokens a window, at least 1.
        packing: several pairs a window, in segments that do not see each other; else one, and no `segment_ids` and
            `positions`.
        pad: id where nothing is.
    """
    rows = [row for row, (prompt, *_) in enumerate(pairs) if len(prompt) <= length]
    sizes = {row: min(_positions(pairs[row]), length) for row in rows}
    bins = _best_fit(sizes, length) if packing else [[row] for row in rows]
    shape = (len(bins), length)
    windows = {
        "token_ids": np.full(shape, pad, np.int32),
        "target_ids": np.full(shape, pad, np.int32),
        "weights": np.zeros(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "review": np.full(shape, -1, np.int32),
    }
    for window, held in enumerate(bins):
        place = 0
        for segment, row in enumerate(held, start=1):
            ids, size = [token for turn in pairs[row] for token in turn], sizes[row]
            is_response = [place % 2 for place, turn in enumerate(pairs[row]) for _ in turn]
            part = window, slice(place, place + size)
            windows["token_ids"][part] = ids[:size]
            windows["target_ids"][part] = ids[1 : size + 1]
            windows["weights"][part] = is_response[1 : size + 1]
            windows["segment_ids"][part] = segment
            windows["positions"][part] = np.arange(size)
            windows["review"][part] = row
            place += size
    if not packing:
        del windows["segment_ids"], windows["positions"]
    return windows


def _positions(pair: Pair) -> int:
    """Return how many positions a pair takes: its tokens, but for the last, which nothing follows."""
    return sum(map(len, pair)) - 1


def _best_fit(sizes: dict[int, int], length: int) -> list[list[int]]:
    """Return which items share a window, the longest first and each where it leaves the least room: few are half empty.

    Args:
        sizes: of each item, at most `length`.
        length: what a window holds.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (what is left, number of the window), sorted
    for item in sorted(sizes, key=lambda item: -sizes[item]):
        found = bisect.bisect_left(rooms, (sizes[item], 0))
        room, number = rooms.pop(found) if found < len(rooms) else (length, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(item)
        bisect.insort(rooms, (room - sizes[item], number))
    return bins


def pair_metrics(windows: Windows, pairs: Sequence[Pair]) -> dict[str, int | float]:
    """Return what became of the pairs' tokens; a pair of p prompt and r response tokens has p + r - 1 to be predicted.

    Returns:
        reviews (the pairs), windows; response_tokens (those that are learnt), tokens_kept (those and the prompts'),
        tokens_cut (thrown away: beyond a window's end, or of a pair left out), pairs_cut (those whose
        response does not fit), prompts_too_long (pairs left out);
        positions_padded (positions with nothing) and filled_fraction (those with something, of all).
    """
    filled = windows["review"] >= 0
    kept = int(np.count_nonzero(filled))
    return {
        "reviews": len(pairs),
        "windows": len(filled),
        "tokens_kept": kept,
        "response_tokens": int(np.count_nonzero(windows["weights"])),
        "tokens_cut": sum(map(_positions, pairs)) - kept,
        "pairs_cut": sum(len(pair[0]) <= filled.shape[1] < _positions(pair) for pair in pairs),
        "prompts_too_long": len(pairs) - len(np.unique(windows["review"][filled])),
        "positions_padded": int(filled.size) - kept,
        "filled_fraction": round(kept / filled.size, 6) if filled.size else 0.0,
    }
