"""What `data/generated/<variant>.jsonl` and `data/metrics/generate-<variant>.json` hold: `report` reads them."""

from __future__ import annotations

from stages.core.records.record import FileRecord, LineRecord, OrAbsent


class Generation(LineRecord):
    """A prompt and a continuation of it; of several the number, from 0."""

    prompt: str
    sample: OrAbsent[int] = None
    text: str


class GenerateMetrics(FileRecord):
    """Continuing the prompts: how many, and the new tokens of all samples."""

    prompts: int
    tokens: int
    tokens_per_second: float
