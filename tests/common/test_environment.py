"""What stands in the environment changes no result: switches are taken away, packages are held to their pins."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.core.common import environment
from stages.core.common.environment import isolate
from stages.core.common.errors import StageError
from stages.core.common.installed import TOOLS, check_installed
from tests.support.repository import ROOT

SWITCHES = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_DISABLE_JIT": "1",
    "KERAS_MAX_STEPS_PER_EPOCH": "1",
    "KERAS_MAX_EPOCHS": "1",
    "KERAS_NNX_ENABLED": "true",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=3 --xla_cpu_enable_fast_math=true",
    "LIBTPU_INIT_ARGS": "--xla_tpu_x=1",
    "NVIDIA_TF32_OVERRIDE": "1",
}
HARMLESS = {"JAX_LOGGING_LEVEL": "ERROR", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": "--xla_dump_to=/x"}


def test_switches_that_change_results_are_taken_away_and_named():
    given = {**SWITCHES, "PATH": "/bin"}
    note = isolate(given)
    assert given == {"PATH": "/bin", "KERAS_BACKEND": "jax", "KERAS_HOME": os.devnull}
    assert all(name in note for name in SWITCHES)
    assert isolate(given) is None


def test_what_only_logs_or_dumps_or_takes_memory_stays():
    given = dict(HARMLESS)
    assert isolate(given) is None
    assert HARMLESS.items() <= given.items()
    given["XLA_FLAGS"] += " --xla_cpu_enable_fast_math=true"
    assert "XLA_FLAGS" in isolate(given)
    assert given["XLA_FLAGS"] == HARMLESS["XLA_FLAGS"]


def test_the_example_in_the_docstring_holds():
    assert doctest.testmod(environment).failed == 0


def test_neither_the_environment_nor_keras_own_configuration_reaches_a_run(tmp_path: Path):
    (tmp_path / ".keras").mkdir()
    configuration = tmp_path / ".keras/keras.json"
    configuration.write_text('{"floatx": "float16", "backend": "torch", "epsilon": 0.1, "max_steps_per_epoch": 1}')
    program = """
from stages.core.cli import records_on_standard_error
from stages.core.sharding.devices import configure
with records_on_standard_error():
    configure("simulated", 2)
import jax, keras
config = jax.config
print(len(jax.devices()), keras.config.floatx(), keras.config.epsilon(), keras.config.backend(),
      keras.src.backend.config.max_steps_per_epoch(), config.jax_enable_x64, config.jax_default_prng_impl,
      config.jax_threefry_partitionable, config.jax_default_matmul_precision)
"""
    given = {**os.environ, **SWITCHES, "HOME": str(tmp_path)}
    given.pop("KERAS_HOME", None)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "float32", "1e-07", "jax", "None", "False", "threefry2x32", "True", "highest"]
    assert result.stderr.startswith("Ignored, since it would change results")


def test_the_installed_packages_are_the_pinned_ones():
    check_installed(ROOT / "requirements.txt")


def test_a_package_in_another_version_than_pinned_stops_a_stage(tmp_path: Path):
    text = (ROOT / "requirements.txt").read_text()
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(text.replace("keras==3.15.1", "keras==3.15.0").replace("jax==0.10.2", "jax==0.10.1"))
    with pytest.raises(StageError) as caught:
        check_installed(requirements)
    assert "jax 0.10.2 (==0.10.1)" in str(caught.value)
    assert "keras 3.15.1 (==3.15.0)" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    requirements.write_text("click==1.0\nno-such-package==1.0\n# keras==1\n-r other.txt\n")
    check_installed(requirements)


def test_the_packages_that_are_not_checked_are_in_the_list():
    pinned = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert pinned >= TOOLS
