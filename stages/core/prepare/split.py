"""Shuffling reviews and holding some out, the same for the same seed.

Purpose: a held-out part with the same proportion of labels as the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from stages.core.prepare.cleaning import Label, Review

T = TypeVar("T")


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """Return the items in an order that depends only on their number and the seed."""
    return [items[position] for position in np.random.default_rng(seed).permutation(len(items))]


def hold_out(reviews: Sequence[Review], count: int, seed: int) -> tuple[list[Review], list[Review]]:
    """Split reviews in those to train on and `count` held out, both in the order given.

    Each label gets the share of the held-out places that it has of all reviews, rounded by the largest remainder
    (Hamilton's method); reviews without labels are one group.

    Args:
        reviews: all of them, more than `count`.
        count: how many to hold out.
        seed: chooses which.

    Returns:
        (train, held out).

    Raises:
        ValueError: `count` is negative or not less than the number of reviews.
    """
    if not 0 <= count < len(reviews):
        raise ValueError(f"count must be less than the number of reviews, {len(reviews)}. Received: count={count}")
    # A stream of its own: the split must not repeat the draws of the shuffle with the same seed.
    generator = np.random.default_rng([seed, 1])
    groups: dict[Label, list[int]] = {}
    for position, review in enumerate(reviews):
        groups.setdefault(review.label, []).append(position)
    exact = [count * len(group) for group in groups.values()]  # in units of 1 / len(reviews), so that ties are exact
    places = [share // len(reviews) for share in exact]
    remainders = [share % len(reviews) for share in exact]
    # Equal remainders are ordered at random, else the labels that come first in the file would always win.
    lot = generator.permutation(len(groups))
    order = sorted(range(len(groups)), key=lambda group: (-remainders[group], lot[group]))
    for group in order[: count - sum(places)]:
        places[group] += 1
    held = set()
    for positions, number in zip(groups.values(), places, strict=True):
        held.update(generator.choice(positions, size=number, replace=False).tolist())
    train = [review for position, review in enumerate(reviews) if position not in held]
    return train, [review for position, review in enumerate(reviews) if position in held]
