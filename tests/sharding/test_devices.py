"""Which accelerator a machine has, and what a run uses where JAX can use it, or cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax._src import hardware_utils

from stages.core.sharding.devices import PCI_DEVICES, PCI_VENDOR, tpu_on_bus
from tests.support.repository import ROOT


def bus(folder: Path, *numbers: tuple[str, str]) -> Path:
    """A folder of PCI devices as Linux lists them."""
    for place, (vendor, device) in enumerate(numbers):
        each = folder / f"0000:00:0{place}.0"
        each.mkdir()
        (each / "vendor").write_text(f"{vendor}\n")
        (each / "device").write_text(f"{device}\n")
    return folder


@pytest.mark.parametrize(
    "numbers, expected",
    [
        ([(PCI_VENDOR, "0x0063")], True),
        ([("0x8086", "0x1237"), (PCI_VENDOR, "0x0062")], True),
        # Google's network card, which each of its cloud machines has; a GPU; nothing at all.
        ([(PCI_VENDOR, "0x0042")], False),
        ([("0x10de", "0x0063")], False),
        ([], False),
    ],
)
def test_a_tpu_on_the_bus_is_told_by_its_maker_and_number(tmp_path, numbers, expected):
    assert tpu_on_bus(bus(tmp_path, *numbers)) is expected


def test_a_machine_without_such_a_folder_or_number_has_none(tmp_path):
    assert not tpu_on_bus(tmp_path / "none")
    (tmp_path / "0000:00:00.0").mkdir()
    assert not tpu_on_bus(tmp_path)


def test_the_numbers_are_those_that_jax_knows(devices):
    known = {number for number, version in hardware_utils._TPU_PCI_DEVICE_IDS.items() if version.name != "plc"}
    assert known == PCI_DEVICES
    assert hardware_utils._GOOGLE_PCI_VENDOR_ID == PCI_VENDOR


# Set up a run in a process of its own, whose device files lie in a folder of the test.
RUN = """
import sys
from pathlib import Path
from stages.core.cli import records_on_standard_error
from stages.core.sharding import devices
from stages.core.common.errors import StageError
devices.DEVICE_FILES, devices.PROBE_SECONDS = Path(sys.argv[1]), float(sys.argv[4])
try:
    with records_on_standard_error():
        platform = devices.configure(sys.argv[2], int(sys.argv[3]))
except StageError as error:
    sys.exit(str(error))
import jax, jax.numpy as jnp
print(platform, len(jax.devices(devices.BACKENDS[platform])), float(jnp.ones(3).sum()))
"""

# A plugin for JAX as vendors write them. It stands in for CUDA or libtpu, which find nothing here: its devices are the
# CPU's.
PLUGIN = """
import os, sys, time
from jax._src import xla_bridge
import jaxlib.xla_client

def client():
    {start}

def initialize():
    {load}
    xla_bridge._backend_factories.pop("{backend}", None)
    xla_bridge.register_backend_factory("{backend}", client, priority=500, fail_quietly=False)
    from jax._src import hardware_utils
    hardware_utils.has_visible_nvidia_gpu = lambda: True
"""
START = {
    "none": "pass",
    "one": "return jaxlib.xla_client.make_cpu_client(num_devices=1)",
    "eight": "return jaxlib.xla_client.make_cpu_client(num_devices=8)",
    "driver": "raise RuntimeError('INTERNAL: no supported devices found for platform CUDA')",
    "several lines": "raise RuntimeError('first\\nsecond ' + 'x' * 9000)",
    "no words": "raise RuntimeError()",
    "aborts": "os.abort()",
    "exits": "sys.exit(3)",
    "hangs": "time.sleep(60)",
    # libtpu's own words.
    "held": "raise RuntimeError('ABORTED: The TPU is already in use by process with pid 4321. Not attempting to load "
    "libtpu.so in this process.')",
}


def configured(
    folder: Path, kind: str, count: int, files: list[str], *, start: str | None = None, load: str = "pass"
) -> subprocess.CompletedProcess[str]:
    """Set up a run on a machine with these device files and, with `start`, a plugin that starts in that way."""
    for name in files:
        (folder / "dev" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "dev" / name).touch()
    if start is not None:
        module = folder / "site" / "jax_plugins" / "stand_in" / "__init__.py"
        module.parent.mkdir(parents=True)
        backend = "tpu" if TPU[0] in files else "cuda"
        module.write_text(PLUGIN.format(backend=backend, start=START[start], load=load))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "KERAS_"))}
    environment["PYTHONPATH"] = str(folder / "site")
    seconds = 4 if start == "hangs" else 100
    command = [sys.executable, "-c", RUN, str(folder / "dev"), kind, str(count), str(seconds)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_without_the_plugin_jax_may_also_say_that_it_does_not_know_the_backend(tmp_path):
    seen = "from jax._src import hardware_utils; hardware_utils.has_visible_nvidia_gpu = lambda: True; return"
    result = configured(tmp_path, "auto", 2, NVIDIA, start="none", load=seen)
    assert result.stdout.split()[:2] == ["cpu", "2"], result.stderr
    assert "is not in the list of known backends. `pip install" in result.stderr
    assert len(result.stderr.splitlines()) == 1


NVIDIA, TPU = ["nvidia0", "nvidiactl"], ["accel0"]
# Device files, how the plugin starts, and what the line must say.
UNUSABLE = {
    "GPU without the plugin": (NVIDIA, None, 'pip install "jax[cuda12]=='),
    "GPU other than the first, without the plugin": (["nvidia3"], None, 'pip install "jax[cuda12]=='),
    "GPU without a driver": (NVIDIA, "driver", "no supported devices found"),
    "GPU whose error has several lines": (NVIDIA, "several lines", "first second x"),
    "GPU whose error has no words": (NVIDIA, "no words", "Unable to initialize backend 'cuda'. "),
    "GPU whose library aborts": (NVIDIA, "aborts", "exit code -6"),
    "GPU whose library ends the process": (NVIDIA, "exits", "exit code 3"),
    "GPU that does not answer": (NVIDIA, "hangs", "no answer within 4.0 s"),
    "fewer GPUs than the mesh": (NVIDIA, "one", "mesh.shape: [1, 1]"),
    # libtpu itself answers: the device file is there and no TPU behind it.
    "TPU that is absent": (TPU, None, "TPU"),
    "TPU that another process holds": (TPU, "held", "in use by process with pid 4321"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_where_jax_cannot_use_an_accelerator_auto_runs_on_the_cpu_and_one_line_says_why(tmp_path, case):
    files, start, says = UNUSABLE[case]
    result = configured(tmp_path, "auto", 2, files, start=start)
    assert (result.returncode, result.stdout.split()) == (0, ["cpu", "2", "3.0"]), result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith("Running on 2 simulated CPU devices (mesh.devices: auto): ")
    assert says in line
    assert len(line) < 600


@pytest.mark.parametrize(
    "case",
    ["GPU without the plugin", "fewer GPUs than the mesh", "TPU that is absent", "TPU that another process holds"],
)
def test_where_jax_cannot_use_an_accelerator_real_ends_in_two_lines(tmp_path, case):
    files, start, says = UNUSABLE[case]
    result = configured(tmp_path, "real", 2, files, start=start)
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 2, result.stderr
    assert says in result.stderr
    assert "Received: mesh.devices=real" in result.stderr


def test_without_an_accelerator_auto_says_nothing_and_real_ends_in_two_lines(tmp_path):
    auto = configured(tmp_path, "auto", 3, [])
    assert (auto.returncode, auto.stdout.split()[:2], auto.stderr) == (0, ["cpu", "3"], "")
    real = configured(tmp_path, "real", 3, [])
    assert (real.returncode, len(real.stderr.splitlines())) == (1, 2)


@pytest.mark.parametrize("kind", ["auto", "real"])
@pytest.mark.parametrize(("files", "platform"), [(NVIDIA, "gpu"), (TPU, "tpu")])
def test_an_accelerator_with_devices_enough_is_used(tmp_path, kind, files, platform):
    result = configured(tmp_path, kind, 4, files, start="eight")
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, [platform, "8", "3.0"], "")


@pytest.mark.parametrize("kind", ["auto", "simulated"])
@pytest.mark.parametrize("load", ["raise ImportError('libcudart.so.12: cannot open shared object file')", "1 / 0"])
def test_a_plugin_that_cannot_be_loaded_shows_no_traceback(tmp_path, kind, load):
    result = configured(tmp_path, kind, 2, NVIDIA, start="none", load=load)
    assert (result.returncode, result.stdout.split()[:2]) == (0, ["cpu", "2"]), result.stderr
    assert len(result.stderr.splitlines()) == (kind == "auto"), result.stderr
