"""What `data/generated/<variant>.jsonl` and `data/metrics/generate/<variant>.json` hold: `report` reads them."""

from __future__ import annotations

from stages.core.records.record import FileRecord, LineRecord, OrAbsent


class Generation(LineRecord):
    """A prompt and a continuation of it; of several the number, from 0."""

    prompt: str
    sample: OrAbsent[int] = None
    text: str


class GenerateMetrics(FileRecord):
    """Continuing the prompts: how many, and the new tokens of all samples.

    Of sequences of tokens: `distinct_n_fraction`, those of n that differ, of all; `repeated_4_fraction`, those of four
    that their text had before. Absent where no text is that long.
    """

    prompts: int
    tokens: int
    tokens_per_second: float
    distinct_1_fraction: OrAbsent[float] = None
    distinct_2_fraction: OrAbsent[float] = None
    repeated_4_fraction: OrAbsent[float] = None
