"""How varied generated texts are: of sequences of n tokens, how many are distinct, and how many repeat their own text.

Purpose: small models fall into loops, and greedy decoding with them; the loss on held-out text does not show that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stages.core.records.generate import GenerateMetrics

# Tokens of a sequence that counts as a repetition.
REPEATED = 4


def distinct(rows: Sequence[Sequence[int]], size: int) -> float | None:
    """Return distinct-n of texts: different sequences of `size` tokens, of all in them.

    Source: https://arxiv.org/abs/1510.03055, section 5.3. None if no text is that long.

    Example:
        >>> distinct([[1, 2, 1, 2]], 2)
        0.6666666666666666
    """
    found = [each for row in rows for each in _sequences(row, size)]
    return len(set(found)) / len(found) if found else None


def repeated(rows: Sequence[Sequence[int]], size: int = REPEATED) -> float | None:
    """Return seq-rep-n: of a text's sequences of `size` tokens those that it had before, averaged over texts.

    Source: https://arxiv.org/abs/1908.04319, section 6.1. Texts that are too short are left out; None if all are.
    """
    found = [list(_sequences(row, size)) for row in rows if len(row) >= size]
    return sum(1 - len(set(each)) / len(each) for each in found) / len(found) if found else None


def metrics(prompts: int, rows: Sequence[Sequence[int]], seconds: float) -> GenerateMetrics:
    """Return `data/metrics/generate/<variant>.json`.

    Args:
        prompts: how many.
        rows: the new tokens of each text.
        seconds: that they took.
    """
    count = sum(len(row) for row in rows)
    shares = (distinct(rows, 1), distinct(rows, 2), repeated(rows))
    one, two, four = (None if share is None else round(share, 5) for share in shares)
    return GenerateMetrics(
        prompts=prompts,
        tokens=count,
        tokens_per_second=round(count / seconds, 2),
        distinct_1_fraction=one,
        distinct_2_fraction=two,
        repeated_4_fraction=four,
    )


def _sequences(row: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    return zip(*(row[start:] for start in range(size)), strict=False)
