"""The code a result depends on: what counts as a change of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.core.common import code


def test_a_comment_a_docstring_and_the_layout_are_no_change_of_the_code(tmp_path: Path):
    def digest(text: str) -> str:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.py"
        file.write_text(text)
        return code._digest(file)

    first = digest('"""One."""\ndef f(x):\n    """Two."""\n    return x + 1\n')
    assert digest("def f(x):  # three\n\n    return (x + 1)\n") != first, "a docstring that is gone is no statement"
    assert digest('"""Other."""\n# Three.\ndef f(x):\n    """Four."""\n    return (x\n            + 1)\n') == first
    assert digest('"""One."""\ndef f(x):\n    """Two."""\n    return x + 2\n') != first


@pytest.mark.parametrize("script", ["finetune", "evaluate", "plan"])
def test_the_search_stops_at_the_plumbing(script: str):
    found = code.dependencies(f"stages/{script}.py")
    assert not [name for name in found if name.startswith(code.PLUMBING)]
    assert {"stages/core/model/cross_entropy.py", "stages/core/sharding/mesh.py"} <= found
    assert all((code.ROOT / name).is_file() for name in found)
    assert all((code.ROOT / name).exists() for name in code.PLUMBING)
