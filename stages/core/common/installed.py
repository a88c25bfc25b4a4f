"""The check that the installed packages are those that `requirements.txt` pins.

Purpose: DVC ties a result to `requirements.txt`. A package upgraded without changing it would make results that are
taken for those of the pinned one.
Reads: `requirements.txt`, the installed packages' versions.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from stages.core.common.errors import StageError

# Pinned too, but no result depends on them.
TOOLS = {
    "click",
    "dvc",
    "filelock",
    "huggingface_hub",
    "importlib_resources",
    "Jinja2",
    "kagglehub",
    "kagglesdk",
    "keras-nlp",
    "pip",
    "pydantic",
    "rich",
    "ruamel.yaml",
}


def check_installed(requirements: Path) -> None:
    """Stop if a package that results depend on is installed in another version than the pinned one.

    A missing package is reported when it is imported.

    Raises:
        StageError: names the packages.
    """
    from packaging.requirements import Requirement

    wrong = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text or text.startswith("-"):
            continue
        requirement = Requirement(text)
        if requirement.name in TOOLS or (requirement.marker and not requirement.marker.evaluate()):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} ({requirement.specifier})")
    if wrong:
        raise StageError(
            f"The installed packages must be those of {requirements.name}. Received: {', '.join(wrong)}\n"
            f"Run `pip install -r {requirements.name}`, or pin these versions there: dvc repro redoes what they make."
        )
