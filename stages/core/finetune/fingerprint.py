"""The fingerprint that identifies a training run, and what changed since a run that cannot be resumed.

Purpose: a run may resume only from a checkpoint of the very same run: same settings, data, base, code and packages.
Mesh, layout and the number of processes are no part of it: on others a run resumes equal to float32 rounding.
Writes: `<cache folder>/checkpoints/<fingerprint>/run.json`, which holds the parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.core.common import code
from stages.core.files import read_json, write_json

logger = logging.getLogger(__name__)

# The training loop; it and all it imports determine a run's result.
ENTRY = "stages/core/finetune/trainer.py"
PACKAGES = ("jax", "jaxlib", "keras", "keras-hub", "numpy")
RUN = "run.json"


def with_program(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a run depends on: the parts, the code and the packages.

    Args:
        parts: settings, data, base and the like; what JSON can hold.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {**parts, "versions": versions, "code": code.digests(ENTRY)}


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """Return 32 hexadecimal digits: equal for equal parts.

    Args:
        parts: from `with_program`.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def record(folder: Path, parts: Mapping[str, Any]) -> None:
    """Save the parts next to the run's checkpoints; log if other code or packages left checkpoints of this run.

    Args:
        folder: of the run's checkpoints.
        parts: from `with_program`.
    """
    if folder.exists():
        return
    for other in sorted(folder.parent.glob(f"*/{RUN}")):
        changed = _changed(parts, other) if any(other.parent.glob("step-*")) else None
        if changed:
            logger.info(
                f"Checkpoints of this run were made by other code or packages and are not used: {changed} changed."
            )
            break
    # Nothing but the message above depends on it.
    with contextlib.suppress(OSError):
        write_json(folder / RUN, dict(parts))


def _changed(parts: Mapping[str, Any], file: Path) -> str | None:
    """Return which code or packages differ, if nothing else does."""
    program = ("code", "versions")
    try:
        other = read_json(file)
        if {**parts, **dict.fromkeys(program)} != {**other, **dict.fromkeys(program)}:
            return None
        names = {name for part in program for name, _ in parts[part].items() ^ other[part].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return ", ".join(sorted(names)) or None
