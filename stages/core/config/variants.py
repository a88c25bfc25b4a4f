"""The setting `variants`: adapters that are measured beside the pipeline's own variants."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from stages.core.common.errors import shown

# The variants that the pipeline itself makes.
PIPELINES_OWN = ("baseline", "tuned")
# Part of the names of files and of DVC's stages, and a key of the settings.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


def _usable(variants: dict[str, str]) -> dict[str, str]:
    for name, folder in variants.items():
        if name in PIPELINES_OWN:
            raise ValueError(f"{name} is the name of one of the pipeline's own variants; choose another")
        if not NAME.fullmatch(name):
            raise ValueError(f"{shown(name)} must be a name of at most 40 letters, digits, - and _")
        # DVC opens the folder by this very text.
        if folder.startswith("~"):
            raise ValueError(f"{name} must be an absolute path, or one relative to the repository, without ~")
    return variants


# From a name to the folder of an adapter.
Variants = Annotated[dict[str, Annotated[str, Field(min_length=1)]], AfterValidator(_usable)]
