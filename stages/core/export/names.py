"""What others call the base: its name at Hugging Face, and whether it answers in turns."""

from __future__ import annotations

import re

from stages.core.fetch.catalog import name_of
from stages.core.records.manifest import Manifest

PRESET = re.compile(
    r"(?P<family>code_gemma|shieldgemma|gemma[234]?)_(?:(?P<version>1\.1)_)?(?P<instruct>instruct_)?"
    r"(?P<size>\d+[bm](?:_a4b)?)(?:_en|_text)?"
)
FAMILIES = {"code_gemma": "codegemma", "gemma2": "gemma-2", "gemma3": "gemma-3", "gemma4": "gemma-4"}
OTHERS = {
    "function_gemma_instruct_270m": "google/functiongemma-270m-it",
    "medgemma_instruct_27b_text": "google/medgemma-27b-text-it",
    "vault_gemma_1b_en": "google/vaultgemma-1b",
}
"""Names that do not follow the rule of the others."""
INSTRUCT = re.compile(r"instruct|[-_]it(?![a-z])", re.IGNORECASE)


def public_name(manifest: Manifest) -> str:
    """Return the name of a preset's original at Hugging Face, or the preset's own where that is not known.

    Example:
        >>> public_name(manifest)  # of gemma3_instruct_1b
        'google/gemma-3-1b-it'
    """
    name = name_of(manifest.preset)
    if name.startswith("hf://"):
        return name.removeprefix("hf://").partition("@")[0]
    found = PRESET.fullmatch(name)
    if manifest.source == "path" or found is None:
        return OTHERS.get(name, name)
    family = FAMILIES.get(found["family"], found["family"])
    version = f"-{found['version']}" if found["version"] else ""
    # Of Gemma 3 the base is "pt" (pre-trained), but for the 270M.
    base = "-pt" if family == "gemma-3" and found["size"] != "270m" else ""
    return f"google/{family}{version}-{found['size'].replace('_', '-')}{'-it' if found['instruct'] else base}"


def is_instruct(manifest: Manifest) -> bool:
    """Return whether a preset answers in turns, by its name; a label that the user gave a folder says nothing."""
    return manifest.source != "path" and INSTRUCT.search(name_of(manifest.preset)) is not None
