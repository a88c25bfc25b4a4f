"""The code a result depends on, read from the imports.

Purpose: one rule for three users. `dvc.yaml` lists these files for each stage (tests/pipeline/test_dag.py compares),
the plan's cache and the checkpoints of a run carry a digest of them.
Reads: the project's own sources; nothing is imported.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[3]

# What cannot change what a stage writes: it reads settings (whose values DVC tracks), defines paths (which
# dvc.yaml lists itself), and shows messages. A change there must not cost a training run, so the search for imports
# stops at these folders and files.
PLUMBING = (
    "stages/__init__.py",
    "stages/core/cli.py",
    "stages/core/common/",
    "stages/core/config/",
    "stages/core/fetch/check.py",
    "stages/core/preview/",
    "stages/core/processes/",
    "stages/core/sharding/program_cache.py",
)


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


def dependencies(file: str) -> set[str]:
    """Return a file and all that it imports, directly or indirectly, without the plumbing.

    Args:
        file: relative to the repository's folder, such as `stages/finetune.py`.

    Returns:
        Paths relative to the repository's folder, with `/`.
    """
    reached: set[str] = set()
    waiting = {file}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        found = {path.relative_to(ROOT).as_posix() for path in imported_files(ROOT / name)}
        waiting |= {path for path in found if not path.startswith(PLUMBING)} - reached
    return reached


def digests(file: str) -> dict[str, str]:
    """Return the digest of what each of the `dependencies` does: comments, docstrings and layout do not count."""
    return {name: _digest(ROOT / name) for name in sorted(dependencies(file))}


@functools.cache
def _digest(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body[0] = ast.Pass()
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
