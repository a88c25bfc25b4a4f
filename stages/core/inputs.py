"""What a stage reads from outside the repository, made visible to DVC.

Purpose: `dvc.yaml` cannot name a path that stands in `params.yaml` and may be null. So it names a fixed place for each,
`data/inputs/<stage>/<key>`: an empty file, or a link to the person's file or folder, which the stage that reads it puts
there. DVC hashes what the link points at: an edit reruns the stage, and its run cache keeps the versions apart.
Writes: `data/inputs/`. They are in git, as the settings are: a changed link belongs with a changed `params.yaml`.
"""

from __future__ import annotations

import os
from pathlib import Path

from stages.core.paths import Paths

FOLDER = "data/inputs"


def declare(paths: Paths, stage: str, key: str, target: Path | None) -> None:
    """Point the place of one input at what was read; a trial (`--out-root`) leaves the pipeline's own place alone.

    Args:
        paths: where the repository lies.
        stage: whose dependency it is.
        key: the input's name there.
        target: a file or folder; None for none. Below the repository the link is relative.
    """
    if paths.out_root != paths.root:
        return
    place = paths.root / FOLDER / stage / key
    if target is None:
        if place.is_symlink() or not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.touch()
        return
    # Not `resolve`, which would follow links of the person's own: DVC is to see where they lead tomorrow.
    target = Path(os.path.normpath(target))
    link = Path(os.path.relpath(target, place.parent) if target.is_relative_to(paths.root) else target)
    if place.is_symlink() and place.readlink() == link:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(link)
