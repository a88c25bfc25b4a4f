"""Whether an adapter in PEFT's form names the base that it is put on.

Purpose: a base and its instruct version have the same shapes, so that only the name distinguishes an adapter of
the one from one of the other; and on the wrong one it still writes text.
"""

from __future__ import annotations

import re
from pathlib import Path

from stages.core.common.errors import StageError, shown
from stages.core.records.manifest import Manifest

# Hugging Face's names (gemma-3-1b-it, codegemma-2b) and keras-hub's (gemma3_instruct_1b, code_gemma_2b_en), with `-`
# for `_`.
GEMMA = re.compile(
    r"(?P<family>(?:[a-z]+-?)?gemma)-?(?P<version>\d(?:\.\d)?(?=-))?-(?P<before>instruct-)?(?P<size>\d+[bm])(?![a-z\d])"
    r"(?P<after>.*)"
)


def check_base(named: str | None, manifest: Manifest, folder: Path) -> None:
    """Refuse an adapter that was made for another Gemma; a base without such a name cannot be distinguished.

    Args:
        named: what the adapter calls its base, None where it does not.
        manifest: of the preset that it is put on.
        folder: of the adapter.

    Raises:
        StageError: family, version, size, or whether it is an instruct model differ.
    """
    # The name of a folder is a label of the user's.
    theirs, ours = _model(named or ""), _model("" if manifest.source == "path" else manifest.preset)
    if theirs and ours and theirs != ours:
        raise StageError(
            f"The adapter must be of the base that it is put on, {manifest.preset}. "
            f"Received: base_model_name_or_path={shown(named)} in {folder}\n"
            "Its shapes may fit all the same. Set fetch.preset to its base, or tune an adapter of this one."
        )


def _model(name: str) -> tuple[str, str | None, str, bool] | None:
    """Return family, version, size and whether it is an instruct model; None for a name of another form."""
    for part in reversed(name.lower().partition("@")[0].split("/")):
        if found := GEMMA.fullmatch(part.replace("_", "-")):
            instruct = bool(found["before"]) or bool({"it", "instruct"} & set(found["after"].split("-")))
            return found["family"].replace("-", ""), found["version"], found["size"], instruct
    return None
