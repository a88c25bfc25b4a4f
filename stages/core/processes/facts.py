"""What must be the same on all processes of a run, and who differs.

Purpose: another commit, another params.yaml or another jax on one host would give a run that hangs or, worse, ends.
Reads: the stage's code and inputs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.core.common import code
from stages.core.common.errors import shown
from stages.core.files import sha256

PACKAGES = ("jax", "jaxlib", "keras", "keras-hub", "ml-dtypes", "numpy", "safetensors")
ABSENT = "absent"


def facts_of(
    stage: str, params: Mapping[str, Any], options: Mapping[str, Any], files: Mapping[str, Path]
) -> dict[str, str]:
    """Return what this process works with, by a name that a message can show.

    Args:
        stage: the stage's name.
        params: all settings, in sections.
        options: of the command line.
        files: inputs, by their names in the repository; a folder counts with all its files.
    """
    found = {f"the setting {key}": value for key, value in _flat(params).items()}
    found |= {f"the option {key}": json.dumps(value, default=str) for key, value in options.items()}
    found["Python"] = platform.python_version()
    for name in PACKAGES:
        try:
            found[f"the package {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"the package {name}"] = ABSENT
    found |= {f"the code in {name}": digest for name, digest in code.digests(f"stages/{stage}.py").items()}
    found |= {f"the input {name}": _digest(path) for name, path in files.items()}
    return found


def difference(facts: Sequence[Mapping[str, str]], names: Sequence[str]) -> str | None:
    """Return what differs first and on whom, in a sentence, or None.

    Args:
        facts: of each process.
        names: of each process, such as `process 2 (host)`.

    Example:
        >>> difference([{"Python": "3.11"}, {"Python": "3.11"}, {"Python": "3.12"}], ["p0", "p1", "p2"])
        'All processes must have the same Python. Received: 3.12 on p2; 3.11 on the others'
    """
    for name in dict.fromkeys(key for each in facts for key in each):
        values = [each.get(name, ABSENT) for each in facts]
        counted = Counter(values).most_common()
        if len(counted) == 1:
            continue
        # Where there is no majority, the first process is right.
        usual = counted[0][0] if counted[0][1] > counted[1][1] else values[0]
        odd: dict[str, list[str]] = {}
        for value, who in zip(values, names, strict=True):
            if value != usual:
                odd.setdefault(value, []).append(who)
        told = "; ".join(f"{shown(value[:16], 16)} on {', '.join(who[:8])}" for value, who in odd.items())
        return f"All processes must have the same {name}. Received: {told}; {shown(usual[:16], 16)} on the others"
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings with dotted keys, each value as JSON."""
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: json.dumps(value, default=str)}
    return found


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files in a folder with their names."""
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        return ABSENT
    lines = "".join(f"{each.relative_to(path)} {_digest(each)}\n" for each in sorted(path.rglob("*")) if each.is_file())
    return hashlib.sha256(lines.encode()).hexdigest()
