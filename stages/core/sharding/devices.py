"""Configures the devices before JAX first asks for them: simulated CPU devices, or the machine's TPU or GPU."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax

from stages.core.common.environment import IGNORED
from stages.core.common.errors import StageError
from stages.core.common.paths import cache_folder
from stages.core.common.stderr import quiet_standard_error
from stages.core.processes.group import current
from stages.core.sharding.program_cache import keep_programs

logger = logging.getLogger(__name__)

# Google's PCI vendor number and those of TPUs v3, v4, v5p, v5e, v6e and v7x, as JAX itself knows them by
# (jax/_src/hardware_utils.py; importing it would import JAX before it is set up).
PCI_VENDOR = "0x1ae0"
PCI_DEVICES = {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}

# Where Linux lists the devices; the tests name another folder.
DEVICE_FILES = Path("/dev")
# JAX's own names of the platforms.
BACKENDS = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}

# Asks JAX for the devices of one platform. JAX keeps what a failed start left behind, a GPU's client takes most of its
# memory, and an accelerator's library may abort or hang: so a separate process asks.
PROBE = """
import json, sys
try:
    import jax
    answer = {"devices": len(jax.devices(sys.argv[1]))}
except Exception as error:
    answer = {"reason": str(error) or type(error).__name__}
print(json.dumps(answer), flush=True)
"""
PROBE_SECONDS = 120

# The platform this process was set up for; JAX cannot be set up twice.
_started: str | None = None


def accelerator() -> str | None:
    """Return `tpu` or `gpu` if this machine has one, else None, without starting JAX.

    With libtpu installed, asking JAX itself would try to open a TPU and fail if there is none.
    """
    if list(DEVICE_FILES.glob("accel[0-9]*")):
        return "tpu"
    # From v5e on a TPU is a device handed to this machine by VFIO, as other hardware may be too.
    if list(DEVICE_FILES.glob("vfio/[0-9]*")) and (
        "TPU_NAME" in os.environ or tpu_on_bus(Path("/sys/bus/pci/devices"))
    ):
        return "tpu"
    # A container may have been given another one than the first.
    if list(DEVICE_FILES.glob("nvidia[0-9]*")):
        return "gpu"
    return None


def tpu_on_bus(devices: Path) -> bool:
    """Return whether one of the PCI devices that Linux lists in a folder is a TPU."""

    def number(file: Path) -> str:
        return file.read_text().strip() if file.is_file() else ""

    return any(
        number(each / "vendor") == PCI_VENDOR and number(each / "device") in PCI_DEVICES for each in devices.glob("*")
    )


def configure(kind: str, count: int) -> str:
    """Set JAX up for a run; to be called before anything asks it for devices.

    Args:
        kind: `simulated` (CPU devices of this process), `real`, or `auto` (real if JAX can use an
            accelerator with enough devices, else simulated, with one line in the log).
        count: number of devices the mesh needs, of all processes together.

    Returns:
        The platform: `cpu`, `tpu` or `gpu`.

    Raises:
        StageError: `real` if there is no accelerator, JAX cannot use it, or it has fewer devices than the mesh; or
            JAX does not start.
    """
    global _started
    if _started is None:
        if IGNORED:
            logger.info(IGNORED)
        platform = _choose(kind, count)
        _start(platform, count // current().count)
        _started = platform
    elif kind == "simulated" and _started != "cpu":
        raise RuntimeError(f"this process already runs on {_started}; JAX cannot change to cpu")
    try:
        # On the CPU, plugins for accelerators that cannot be loaded do not matter: JAX would show their tracebacks.
        with quiet_standard_error():
            available = len(jax.devices(BACKENDS[_started]))
    except Exception as error:
        raise StageError(
            f"JAX must start on this machine's {_started.upper()}. Received: {_one_line(str(error))}\n"
            "End what else uses the device, or uninstall the JAX plugin that the message names."
        ) from error
    if available < count:
        raise StageError(
            f"The mesh needs {count} devices and this process has {available} ({_started}). Received: "
            f"mesh.shape with {count} devices. Make the mesh smaller, or set mesh.devices=simulated."
        )
    if current().count > 1 and available != count:
        raise StageError(
            f"Of several processes the mesh must use all devices: {available} on {current().count} processes "
            f"({_started}). Received: mesh.shape with {count} devices. Give mesh.shape that product."
        )
    return _started


def _choose(kind: str, count: int) -> str:
    """Return the platform to run on, as `configure` says; JAX is not started in this process."""
    if kind == "simulated":
        return "cpu"
    found = accelerator()
    if found is not None and current().count > 1:
        # A process that asks alone would wait for the others' devices.
        return found
    if found is None:
        if kind == "auto":
            return "cpu"
        problem, remedy = "none was found here", "Run on a machine that has one."
    else:
        available, reason = _probe(found)
        if available >= count:
            return found
        problem = f"JAX cannot use the {found.upper()} here: {reason}"
        remedy = _remedy(found, reason)
        if available:
            problem = f"the mesh needs {count} devices and JAX finds {available} ({found.upper()}) here"
            remedy = f"mesh.shape: [1, {available}] fits."
    if kind == "real":
        raise StageError(
            f"mesh.devices: real needs a TPU or GPU, and {problem}. Received: mesh.devices=real\n"
            f"{remedy} Or set mesh.devices to auto or simulated to run on CPU devices.".lstrip()
        )
    logger.info(f"Running on {count} simulated CPU devices (mesh.devices: auto): {problem}. {remedy}")
    return "cpu"


def _remedy(platform: str, reason: str) -> str:
    """Return what makes JAX use this accelerator, in a sentence."""
    # Both of JAX's ways to say it: "Unknown backend cuda", "'cuda' is not in the list of known backends".
    if platform == "gpu" and "known backend" in reason:
        return f'`pip install "jax[cuda12]=={version("jax")}"` installs what JAX lacks.'
    return "End what else may use it, and see that its driver and library are installed."


def _probe(platform: str) -> tuple[int, str]:
    """Return how many devices JAX finds on a platform, in a separate process, and the reason if there are none."""
    # The process imports what this one would.
    variables = os.environ | {
        "JAX_PLATFORMS": f"{BACKENDS[platform]},cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-c", PROBE, BACKENDS[platform]]
    try:
        process = subprocess.run(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return 0, f"no answer within {PROBE_SECONDS} s"
    try:
        answer = json.loads(process.stdout.splitlines()[-1])
        if "devices" in answer and process.returncode == 0:
            return answer["devices"], "it has no devices"
        reason = answer["reason"]
    except (IndexError, KeyError, TypeError, ValueError):
        said = process.stderr.strip().splitlines()[-1:]
        reason = ": ".join([f"the process that asked ended with exit code {process.returncode}", *said])
    return 0, _one_line(reason)


def _one_line(reason: str) -> str:
    """Return what JAX said on one line of bounded length, without its advice and its list of other backends."""
    line = " ".join(reason.partition(" (set JAX_PLATFORMS")[0].split())
    line = line.partition(" Available backends are")[0].partition(": ['cpu'")[0]
    return (line if len(line) <= 300 else line[:297] + "...").rstrip(".:")


def _start(platform: str, count: int) -> None:
    """Set what JAX reads when it first asks for devices."""
    if "keras" in sys.modules and sys.modules["keras"].config.backend() != "jax":
        raise RuntimeError("Keras was imported before this package and has another backend. Set KERAS_BACKEND=jax.")
    jax.config.update("jax_platforms", "cpu" if platform == "cpu" else f"{BACKENDS[platform]},cpu")
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", count)
    # A product of float32 numbers is one: by default a TPU rounds them to bfloat16 first (and XLA then keeps whole
    # activations so), a GPU to TensorFloat-32. Products of bfloat16 numbers stay what they are.
    jax.config.update("jax_default_matmul_precision", "highest")
    keep_programs(cache_folder() / "xla")
