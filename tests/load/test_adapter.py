"""The tuned weights' file: stable bytes, a description of its own, and a refusal where it does not belong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stages.core.common.errors import StageError
from stages.core.load import adapter
from tests.support.repository import ROOT

DESCRIPTION = {"base": "b" * 64, "preset": "tiny", "rank": 2, "alpha": 2.0, "targets": ["query"], "file": "x"}
ARRAYS = {"z/lora_kernel_a": np.ones((2, 3), "f4"), "a/lora_kernel_b": np.zeros((3, 2), "f4")}


def test_what_is_saved_is_loaded_with_its_description(tmp_path: Path):
    path = tmp_path / "adapter.safetensors"
    adapter.save(path, ARRAYS, DESCRIPTION)
    loaded = adapter.load(path, "b" * 64)
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert adapter.describe(path) == DESCRIPTION
    assert [each.name for each in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_the_same_weights_give_the_same_bytes_in_another_process(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from tests.load.test_adapter import *\n"
        "adapter.save(Path(sys.argv[1]), dict(reversed(ARRAYS.items())), dict(reversed(DESCRIPTION.items())))"
    )
    written = set()
    for number in range(3):
        path = tmp_path / f"{number}.safetensors"
        subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True)
        written.add(path.read_bytes())
    assert len(written) == 1


def test_another_base_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "adapter.safetensors"
    adapter.save(path, ARRAYS, DESCRIPTION)
    with pytest.raises(StageError, match=r"trained on: tiny \(bbbbbbbbbbbb\). Received: base=cccccccccccc"):
        adapter.load(path, "c" * 64)


@pytest.mark.parametrize("keep", [0, 5, 60])
def test_a_damaged_file_is_told(tmp_path: Path, keep: int):
    path = tmp_path / "adapter.safetensors"
    adapter.save(path, ARRAYS, DESCRIPTION)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StageError, match="cannot be read"):
        adapter.load(path, "b" * 64)


def test_a_file_of_another_program_is_refused(tmp_path: Path):
    save_file(ARRAYS, tmp_path / "other.safetensors")
    with pytest.raises(StageError, match="must be written by this project"):
        adapter.load(tmp_path / "other.safetensors", "b" * 64)
