"""What `data/generated/<variant>.jsonl` and `data/metrics/generate-<variant>.json` hold: `report` reads them."""

from __future__ import annotations

from stages.core.records.record import FileRecord, LineRecord


class Generation(LineRecord):
    """A prompt and its continuation."""

    prompt: str
    text: str


class GenerateMetrics(FileRecord):
    """Continuing the prompts: how many, and the new tokens."""

    prompts: int
    tokens: int
    tokens_per_second: float
