"""The training curve: what happened at each step, as CSV, and what was generated on the way, as JSON lines.

Writes: `data/plots/finetune.csv`, `data/plots/samples.jsonl`.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from stages.core.files import atomic_path, write_text

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "accuracy",
    "tokens",
    "tokens_per_second",
    "positions_per_second",
    "learning_rate",
    "validation_loss",
)


def write_curve(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as CSV, one a step."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def write_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    """Write the samples, one JSON object a line: step, prompt and text. No sample makes one empty line.

    Of an empty file DVC would warn at each look.
    """
    write_text(path, "\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples) + "\n")
