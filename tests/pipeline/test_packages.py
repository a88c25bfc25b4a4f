"""The packages of stages/core import one another along the arrows that its docstring draws, and in no circle."""

from __future__ import annotations

import ast
import graphlib
import re
from collections import defaultdict
from pathlib import Path

import stages.core
from tests.support.repository import ROOT

CORE = ROOT / "stages" / "core"


def imported(file: Path) -> set[str]:
    """The modules below `stages.core` that a file imports, anywhere in it, as dotted names without that prefix."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stages.core"):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                path = name.split(".")[2:]
                while path and not (CORE / Path(*path)).with_suffix(".py").is_file():
                    path = path[:-1]
                names.add(".".join(path) or name)
        elif isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("stages.core")], file
    return names


def drawn() -> dict[str, set[str]]:
    """The arrows of the docstring."""
    lines = [line.split("->") for line in stages.core.__doc__.splitlines() if "->" in line]
    return {name.strip(): set(targets.split()) for name, targets in lines}


FILES = [path for path in CORE.rglob("*.py") if path.name != "__init__.py"]


def test_packages_import_along_the_arrows_and_every_arrow_is_used():
    arrows = defaultdict(set)
    for file in FILES:
        own = file.relative_to(CORE).parts[0].removesuffix(".py")
        arrows[own] |= {name.split(".")[0] for name in imported(file)} - {own}
    assert dict(arrows) == drawn()


def test_each_line_of_arrows_needs_only_lines_below_it():
    lines = list(drawn())
    for place, name in enumerate(lines):
        assert drawn()[name] <= set(lines[place + 1 :]), name


def test_no_files_import_each_other_in_a_circle():
    graph = {".".join(file.relative_to(CORE).with_suffix("").parts): imported(file) for file in FILES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


def test_each_package_says_what_lives_in_it_and_what_it_may_import():
    for file in CORE.glob("*/__init__.py"):
        lives, _, imports = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("Imports ")
        assert lives.strip() and imports, file
        assert set(re.findall(r"`(\w+)`", imports)) == drawn()[file.parent.name], file


def test_what_test_modules_share_is_no_test_module():
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tests"):
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                assert not any(re.match(r"tests(\.\w+)*\.test_", name) for name in names), (file, names)
