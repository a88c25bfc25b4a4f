"""A copy of the repository as a clone would have it, and the real dvc run in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.support import warm
from tests.support.repository import ROOT

IDENTITY = ["-c", "user.name=Test", "-c", "user.email=test@localhost"]


def copy_repository(folder: Path) -> Path:
    """Copy what git knows or would add, without tests and without the committed results, and commit it there."""
    names = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(names, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in listed:
        if name and (ROOT / name).is_file() and not name.startswith(("tests/", "data/metrics/")) and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "A copy"]):
        subprocess.run(["git", *IDENTITY, *command], cwd=folder, check=True)
    return folder


def dvc(repository: Path, *arguments: str, forked: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real dvc in a copy of the repository, with this environment's packages.

    Args:
        repository: the copy.
        arguments: of dvc.
        forked: dvc and the stages are forked (see tests/support/warm); else started as a user starts them.
        environment: variables beside those of this process.
    """
    own = Path(sys.executable)
    paths = [str(own.parent), os.environ["PATH"]]
    if forked:
        paths.insert(0, str(Path(warm.python()).parent))
    result = subprocess.run(
        [warm.python("dvc") if forked else own, "-m", "dvc", *arguments],
        cwd=repository,
        env={**os.environ, "PATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"dvc {' '.join(arguments)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def ran(result: subprocess.CompletedProcess[str]) -> set[str]:
    """The stages that `dvc repro` really ran."""
    return {line.split("'")[1] for line in result.stdout.splitlines() if line.startswith("Running stage")}


def change(repository: Path, section: str, **values: Any) -> None:
    """Change settings in `params.yaml` in place."""
    yaml = YAML()
    path = repository / "params.yaml"
    content = yaml.load(path.read_text())
    content[section].update(values)
    with path.open("w") as stream:
        yaml.dump(content, stream)
