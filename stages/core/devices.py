"""Choosing the devices before JAX starts: simulated ones on the CPU, or the TPU or GPU that is there.

Purpose: JAX reads its platform and device count once, when it is first used; TensorFlow, which keras-hub would import,
must not take an accelerator away. Everything that needs JAX, Keras or keras-hub goes through here first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import click

from stages.core import environment
from stages.core.errors import StageError
from stages.core.paths import cache_folder

# Google's PCI vendor number and those of TPUs v3, v4, v5p, v5e, v6e and v7x, as JAX itself knows them by
# (jax/_src/hardware_utils.py; importing it would import JAX before it is set up).
PCI_VENDOR = "0x1ae0"
PCI_DEVICES = {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}

# The platform this process was set up for; JAX cannot be set up twice.
_started: str | None = None


def accelerator() -> str | None:
    """Return `tpu` or `gpu` if this machine has one, else None, without starting JAX.

    With libtpu installed, asking JAX itself would try to open a TPU and complain where there is none.
    """
    if list(Path("/dev").glob("accel[0-9]*")):
        return "tpu"
    # From v5e on a TPU is a device handed to this machine by VFIO, as other hardware may be too.
    if list(Path("/dev/vfio").glob("[0-9]*")) and (
        "TPU_NAME" in os.environ or tpu_on_bus(Path("/sys/bus/pci/devices"))
    ):
        return "tpu"
    if Path("/dev/nvidia0").exists():
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
    """Set up JAX and Keras for a run; to be called before Keras is imported.

    Args:
        kind: `simulated` (CPU devices of this process), `real`, or `auto` (real where there is an accelerator).
        count: number of devices the mesh needs.

    Returns:
        The platform: `cpu`, `tpu` or `gpu`.

    Raises:
        StageError: fewer real devices than the mesh needs, or `real` on a machine without an accelerator.
    """
    found = accelerator()
    if kind == "real" and found is None:
        raise StageError(
            "mesh.devices: real needs a TPU or GPU and none was found here. Received: mesh.devices=real. "
            "Set it to auto or simulated to run on CPU devices."
        )
    platform = found if kind != "simulated" and found is not None else "cpu"
    global _started
    if _started is None:
        _start(platform, count)
        _started = platform
    elif _started != platform:
        raise RuntimeError(f"this process already runs on {_started}; JAX cannot change to {platform}")
    import jax

    available = len(jax.devices(platform if platform != "gpu" else "cuda"))
    if available < count:
        raise StageError(
            f"The mesh needs {count} devices and this machine has {available} ({platform}). Received: "
            f"mesh.shape with {count} devices. Make the mesh smaller, or set mesh.devices=simulated."
        )
    return platform


def _start(platform: str, count: int) -> None:
    """Set what JAX and Keras read once."""
    if "keras" in sys.modules:
        raise RuntimeError("devices.configure must be called before Keras is imported: it chooses Keras' backend")
    if note := environment.isolate():
        click.echo(note, err=True)
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "tpu": "tpu,cpu", "gpu": "cuda,cpu"}[platform]
    import jax

    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", count)
    from stages.core.program_cache import keep_programs

    keep_programs(cache_folder() / "xla")


def import_keras_hub() -> ModuleType:
    """Import keras-hub without TensorFlow, which it takes for optional and needs for its tokenizers only.

    It would cost four of six seconds at each start, print notes, and take an accelerator's memory away from JAX. Our
    tokenizer is the sentencepiece library's.
    """
    if "keras_hub" not in sys.modules:
        hidden = [name for name in ("tensorflow", "tensorflow_text") if name not in sys.modules]
        # None makes Python raise ImportError, as if the package were not installed.
        sys.modules.update(dict.fromkeys(hidden))
        try:
            import keras_hub
        finally:
            for name in hidden:
                del sys.modules[name]
    import keras_hub

    return keras_hub
