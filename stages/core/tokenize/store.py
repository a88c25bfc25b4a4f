"""The sequences of a split as a file: `data/tokens/*.npz`, written by `tokenize` and read by `finetune`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stages.core.common.errors import StageError
from stages.core.common.paths import TOKENS, Paths
from stages.core.files import atomic_path

Sequences = dict[str, np.ndarray]


def read_sequences(paths: Paths, split: str) -> dict[str, np.ndarray]:
    """Return the arrays of a split, as `tokenize` wrote them.

    Raises:
        StageError: there is no sequence in it, or no token to train on.
    """
    with np.load(paths.read(TOKENS[split])) as file:
        sequences = {name: file[name] for name in file.files}
    if not len(sequences["token_ids"]):
        raise StageError(f"{TOKENS[split]} must hold at least one sequence. Received: none. Give prepare more reviews.")
    if not (sequences["weights"] > 0).any():
        raise StageError(
            f"{TOKENS[split]} must hold at least one token to train on. Received: none in "
            f"{len(sequences['weights'])} sequences. Give prepare other texts, or tokenize a greater length."
        )
    return sequences


def write_sequences(path: Path, sequences: Sequences) -> None:
    """Write the arrays as an .npz file, atomically.

    The same arrays give the same bytes: numpy dates every entry 1980, and nothing is compressed, since compressed bytes
    depend on the machine's zlib.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        # numpy's own types take any keyword for its flag.
        np.savez(stream, **sequences)  # type: ignore[arg-type]
