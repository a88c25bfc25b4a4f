"""Lays out reviews, as token ids, in sequences of a fixed length: packed, or one per review as in the tutorial.

Purpose: training data in which each target belongs to one review and can be traced to it.
The arrays of `data/tokens/*.npz` are, each (sequences, length):
    token_ids   int32    the model's input; pad in unused positions
    target_ids  int32    the token that follows each input; pad in unused positions
    weights     float32  the loss mask: 1 where the target is trained on; 0 if unused, or only context
    review      int32    the review's row number in its parquet file; -1 if unused
and with packing also
    segment_ids int32    1, 2, 3, ... within a sequence, one per piece of a review; 0 if unused
    positions   int32    0, 1, 2, ... within each segment; 0 if unused
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.core.tokenize.store import Sequences


def pack(reviews: Sequence[Sequence[int]], length: int, *, bos: int, eos: int | None, pad: int) -> Sequences:
    """Pack reviews back to back into full sequences, in order; only the last sequence may be partly empty.

    Each piece of a review, also one continued in the next sequence, starts with BOS: Gemma needs it.
    A piece of k positions is [BOS, t1 .. t(k-1)] with targets [t1 .. tk]. BOS predicts how a review begins, not how
    one continues: a continued piece begins with the last token of the piece before, as context, with weight 0. So every
    token, and the EOS of every review, is a target with weight 1 exactly once, predicted from at least one token
    before it unless it is the review's first, and never from another review.

    Args:
        reviews: token ids of each, without BOS and EOS.
        length: tokens per sequence, at least 2.
        bos: id put first in each piece.
        eos: id that ends each review; None for no such token.
        pad: id of unused positions.
    """
    ending = [] if eos is None else [eos]
    targets = [np.array([*review, *ending], np.int32) for review in reviews]
    pieces = []  # (row of the review, number of its first target, targets that are only context, positions)
    place = 0
    for row, review in enumerate(targets):
        done = 0
        while done < len(review):
            context = min(done, 1)
            first = done - context
            size = min(length - place % length, len(review) - first)
            pieces.append((row, first, context, size))
            place += size
            done = first + size
    # Sequences are full, so all of them concatenated are all pieces concatenated.
    positions = -(-place // length) * length
    flat = {
        "token_ids": np.full(positions, pad, np.int32),
        "target_ids": np.full(positions, pad, np.int32),
        "weights": np.zeros(positions, np.float32),
        "segment_ids": np.zeros(positions, np.int32),
        "positions": np.zeros(positions, np.int32),
        "review": np.full(positions, -1, np.int32),
    }
    place = segment = 0
    for row, first, context, size in pieces:
        segment = segment + 1 if place % length else 1
        piece, ids = slice(place, place + size), targets[row][first : first + size]
        flat["token_ids"][piece] = [bos, *ids[:-1]]
        flat["target_ids"][piece] = ids
        flat["weights"][place + context : place + size] = 1
        flat["segment_ids"][piece] = segment
        flat["positions"][piece] = np.arange(size)
        flat["review"][piece] = row
        place += size
    return {name: array.reshape(-1, length) for name, array in flat.items()}


def one_per_review(
    reviews: Sequence[Sequence[int]],
    length: int,
    *,
    bos: int,
    eos: int | None,
    pad: int,
    eos_after_cut: bool = False,
) -> Sequences:
    """Lay each review out in one sequence, truncated and padded.

    BOS, the review and EOS are cut or padded to length + 1; inputs are all but the last of these, targets all but the
    first, and a weight is 1 where the target is no padding.

    Args:
        reviews, length, bos, pad: as for `pack`.
        eos: id that ends each review that is whole; None for no such token.
        eos_after_cut: the last token of a review that is cut is EOS too, exactly as keras-hub's
            `GemmaCausalLMPreprocessor` has it. The model then learns to stop where the sequence ends.
    """
    ending = [] if eos is None else [eos]
    shape = (len(reviews), length + 1)
    tokens = np.full(shape, pad, np.int32)
    filled = np.zeros(shape, bool)
    for row, review in enumerate(reviews):
        line = [bos, *review, *ending][: length + 1]
        if eos_after_cut and len(review) > length - len(ending):
            line[len(line) - len(ending) :] = ending
        tokens[row, : len(line)] = line
        filled[row, : len(line)] = True
    rows = np.arange(len(reviews), dtype=np.int32)[:, None]
    return {
        "token_ids": tokens[:, :-1],
        "target_ids": tokens[:, 1:],
        "weights": filled[:, 1:].astype(np.float32),
        "review": np.where(filled[:, :-1], rows, np.int32(-1)),
    }


def cut_by_truncation_fraction(reviews: Sequence[Sequence[int]], length: int, *, eos: bool) -> float:
    """Return the share of all tokens (with each review's EOS if there is one) that `one_per_review` discards."""
    room = length - 1 if eos else length
    cut = sum(max(0, len(review) - room) for review in reviews)
    total = sum(map(len, reviews)) + len(reviews) * int(eos)
    return round(cut / total, 6) if total else 0.0


def sequence_metrics(sequences: Sequences, reviews: Sequence[Sequence[int]], *, eos: bool) -> dict[str, int | float]:
    """Count the reviews' tokens.

    Returns:
        reviews, sequences; tokens_kept (targets trained on) and tokens_cut (discarded), both including
        each review's EOS if there is one; tokens_repeated (context only, where a review continues in the next
        sequence); positions_padded (unused) and filled_fraction (positions with a target, of all).
    """
    weights = sequences["weights"]
    kept = int(np.count_nonzero(weights))
    repeated = int(np.count_nonzero(sequences["segment_ids"])) - kept if "segment_ids" in sequences else 0
    return {
        "reviews": len(reviews),
        "sequences": len(weights),
        "tokens_kept": kept,
        "tokens_cut": sum(map(len, reviews)) + len(reviews) * int(eos) - kept,
        "tokens_repeated": repeated,
        "positions_padded": int(weights.size) - kept - repeated,
        "filled_fraction": round(kept / weights.size, 6) if weights.size else 0.0,
    }
