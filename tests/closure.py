"""The project files that a stage script can reach by imports, read from the source without running it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Files that cannot change what a stage writes: they read settings (whose values DVC tracks), name places (which
# dvc.yaml names itself), and talk to the person. A change in them must not cost anyone a training run.
PLUMBING = {
    "stages/__init__.py",
    "stages/core/__init__.py",
    *(
        f"stages/core/{name}.py"
        for name in ("cli", "errors", "fetch_check", "measures", "params", "paths", "plan_check", "progress", "quiet")
    ),
}


def imported_files(path: Path) -> set[Path]:
    """Return the project's own files that one file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stages"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            candidate = ROOT / (name.replace(".", "/") + ".py")
            if name.startswith("stages") and candidate.is_file():
                found.add(candidate)
    return found


def code_dependencies(script: str) -> set[str]:
    """Return what `dvc.yaml` must list as a stage's code: its script and all it reaches, without the plumbing."""
    reached: set[Path] = set()
    waiting = [ROOT / script]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting.extend(imported_files(path))
    return {path.relative_to(ROOT).as_posix() for path in reached} - PLUMBING
