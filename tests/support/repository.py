"""Where the repository and its recorded data are, the pipeline's stages, and the families that tests run over."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.core.common.paths import cache_folder

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
QUICK = ROOT / "tests" / "support" / "quick"
"""On the path of what tests start: see the plugin in it."""
PIPELINE: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
STAGES: dict[str, Any] = {name: stage.get("do", stage) for name, stage in PIPELINE["stages"].items()}
"""Of a stage that is there for each variant, the definition that they share."""
FOLDERS: dict[str, str] = PIPELINE["vars"][0]["variants"]
"""Of the pipeline's own variants, by name."""


def variants_of(stage: str) -> list[str]:
    """The variants that a stage is there for, an empty name where there is only one."""
    return list(FOLDERS) if "foreach" in PIPELINE["stages"][stage] else [""]


def of_variant(path: str, variant: str, folder: str = "") -> str:
    """A path of dvc.yaml as it is for a variant; `folder` is that of one of the user's."""
    return path.replace("${key}", variant).replace("${item}", folder or FOLDERS.get(variant, ""))


def outputs(stage: str, *, kept: bool = False, variants: Sequence[str] | None = None) -> list[str]:
    """The outputs and metrics of a stage in dvc.yaml, a path per variant; `kept`: only those in DVC's cache."""
    entries = [
        (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        for key in ("outs", "metrics")
        for entry in STAGES[stage].get(key, [])
    ]
    paths = [path for path, options in entries if not kept or options.get("cache", True)]
    return [of_variant(path, variant) for path in paths for variant in variants or variants_of(stage)]


FAMILIES = ("gemma", "gemma2", "gemma3", "gemma4")

# The real weights may be there already; tests on tiny models must not write beside them. Workers of pytest-xdist
# inherit the environment of the process that starts them, the session's own cache included.
REAL_CACHE = Path(os.environ.setdefault("GEMMA_TUNING_TESTS_REAL_CACHE", str(cache_folder())))
