"""The sequences of a split as a file: `data/tokens/*.npz`, written by `tokenize` and read by `finetune`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stages.core.common.errors import StageError
from stages.core.common.paths import TOKENS, Paths
from stages.core.files import atomic_path

Windows = dict[str, np.ndarray]


def read_windows(paths: Paths, split: str) -> dict[str, np.ndarray]:
    """Return the arrays of a split, as `tokenize` wrote them.

    Raises:
        StageError: there is no window in it, or no token that is learnt.
    """
    with np.load(paths.read(TOKENS[split])) as file:
        windows = {name: file[name] for name in file.files}
    if not len(windows["token_ids"]):
        raise StageError(f"{TOKENS[split]} must hold at least one window. Received: none. Give prepare more reviews.")
    if not (windows["weights"] > 0).any():
        raise StageError(
            f"{TOKENS[split]} must hold at least one token that is learnt. Received: none in "
            f"{len(windows['weights'])} sequences. Give prepare other texts, or tokenize a greater length."
        )
    return windows


def write_windows(path: Path, windows: Windows) -> None:
    """Write the arrays as an .npz file, atomically.

    The same arrays give the same bytes: numpy dates every entry 1980, and nothing is compressed, since the outcome of
    that depends on the zlib of the machine.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        # numpy's own types take any keyword for its flag.
        np.savez(stream, **windows)  # type: ignore[arg-type]
