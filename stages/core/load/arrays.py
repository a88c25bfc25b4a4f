"""Arrays in a safetensors file: tuned weights and checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file


def write_arrays(target: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; not atomic by itself.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    try:
        save_file(dict(arrays), target, metadata=metadata)
    except SafetensorError as error:
        # The library has one type for all; only its text has the system's error.
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(target)) from error
        raise
