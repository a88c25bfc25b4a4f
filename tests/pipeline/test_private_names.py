"""What Keras, keras-hub and JAX keep private is named in one module each, and our modules keep theirs to themselves."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.repository import ROOT

SHARDING = ROOT / "stages" / "core" / "sharding"
PROCESSES = ROOT / "stages" / "core" / "processes"
INTERNALS = {SHARDING / "keras_internals.py", SHARDING / "program_cache.py", PROCESSES / "runtime.py"}
FILES = sorted(set((ROOT / "stages").rglob("*.py")) - INTERNALS)
# huggingface_hub has no public way to get at its own client.
ALLOWED = {
    ROOT / "stages" / "core" / "fetch" / "hub.py": {"_http"},
    # Public in spite of its underscore: it ends a process whose collective waits for a dead one.
    ROOT / "stages" / "core" / "processes" / "star.py": {"os._exit"},
    # Where a class of a preset is defined, as keras-hub writes it into the preset's files.
    ROOT / "stages" / "core" / "export" / "keras_preset.py": {"keras_hub.src"},
}
NAMED_TUPLE = {"_replace", "_asdict", "_fields", "_make"}  # public, in spite of the underscore


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def foreign_names(source: str) -> set[str]:
    """Private names that a module uses without having defined them, each as it stands in the source."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own |= {each.attr for each in attributes if isinstance(each.ctx, ast.Store) and ast.unparse(each.value) == "self"}
    found = set(re.findall(r"\b(?:keras|keras_hub|jax)\._?src\b", source))
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in NAMED_TUPLE:
            of_itself = ast.unparse(node.value) in {"self", "cls", "super()"}
            found |= set() if of_itself and node.attr in own else {ast.unparse(node)}
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(each.name for each in node.names)]
            found |= {name for name in names if is_private(name)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "setattr", "hasattr"}:
            names = [each.value for each in node.args[1:2] if isinstance(each, ast.Constant)]
            found |= {name for name in names if is_private(name)}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_module_uses_no_private_name_of_another(file: Path):
    assert foreign_names(file.read_text(encoding="utf-8")) == ALLOWED.get(file, set())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("variable._value = 1", "variable._value"),
        ("class A:\n    def f(self):\n        self._flatten_layers()", "self._flatten_layers"),
        ("from keras.src.backend import global_state", "keras.src"),
        ("from stages.core.files import _digest", "_digest"),
        ("getattr(layer, '_kernel')", "_kernel"),
    ],
)
def test_such_a_name_would_be_seen(source: str, found: str):
    assert foreign_names(source) == {found}
