"""A folder that looks like a keras-hub preset, for tests that only handle its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def make_preset(folder: Path, weights: Sequence[str] = ("model.weights.h5",)) -> Path:
    """Write the files of a keras-hub preset, with content that no test looks into."""
    (folder / "assets" / "tokenizer").mkdir(parents=True)
    config = {"class_name": "GemmaBackbone", "registered_name": "keras_hub>GemmaBackbone", "config": {"num_layers": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "assets" / "tokenizer" / "vocabulary.spm").write_bytes(b"vocabulary")
    for name in weights:
        (folder / name).write_bytes(name.encode() * 100)
    return folder
