"""Checkpoints of plain arrays, for tests of their folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.core.finetune.checkpoint import Store
from stages.core.finetune.pieces import Piece


def keep(store: Store, step: int, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any] | None = None) -> None:
    """Save whole arrays, and wait until they are kept, or not."""
    store.save(step, [Piece.of_all(name, values) for name, values in arrays.items()], state or {})
    store.finish()
