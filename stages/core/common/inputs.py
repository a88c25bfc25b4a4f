"""What a stage reads from outside the repository, made visible to DVC.

Purpose: `dvc.yaml` cannot name a path that is set in `params.yaml` and may be null. So it lists a fixed path for each,
`data/inputs/<stage>/<key>`: a link to the user's file or folder, or to `data/inputs/none`, which the stage that reads
it puts there. DVC hashes what the link points at: an edit reruns the stage, and its run cache keeps the versions apart.
Always a link, never a file: where git knows a file and finds a link, `dvc exp run` writes the file through the link,
over the user's own, and loses the changed settings.
Writes: `data/inputs/`. They are in git, as the settings are: a changed link belongs with a changed `params.yaml`.
"""

from __future__ import annotations

import os
from pathlib import Path

from stages.core.common.paths import Paths
from stages.core.files import write_text

FOLDER = "data/inputs"
NONE = f"{FOLDER}/none"


def declare(paths: Paths, stage: str, key: str, target: Path | None) -> None:
    """Link one input's fixed path to the file that was read; a trial (`--out-root`) leaves the pipeline's link alone.

    Args:
        paths: of the repository.
        stage: whose dependency it is.
        key: the input's name there.
        target: a file or folder; None for none. Within the repository the link is relative.
    """
    if paths.out_root != paths.root:
        return
    place = paths.root / FOLDER / stage / key
    if target is None:
        target = paths.root / NONE
        if not target.exists():
            write_text(target, "No file or folder of your own.\n")
    # Not `resolve`, which would follow the user's own links: DVC must notice when their targets change.
    target = Path(os.path.normpath(target))
    link = Path(os.path.relpath(target, place.parent) if target.is_relative_to(paths.root) else target)
    if place.is_symlink() and place.readlink() == link:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(link)
