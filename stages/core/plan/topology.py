"""Device topologies for ahead-of-time compilation: TPUs described by libtpu, GPUs, and simulated CPU devices.

Purpose: the one place that knows a topology by its name, and libtpu's environment. It opens no TPU and no GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from stages.core.common.errors import StageError
from stages.core.plan import gpus
from stages.core.plan.chips import CHIPS, Chip

# Suggestions for a topology that does not exist: a host, and a few slices.
EXAMPLES = {
    "v2": ("2x2", "4x4"),
    "v3": ("2x2", "4x4", "4x8"),
    "v4": ("2x2x1", "2x2x2", "2x2x4"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "8x8", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "4x4x4"),
}
# What libtpu reads when it is first used: not to ask the metadata server of a machine that has none, to take itself
# for one host, and to log nowhere. The accelerator's type is overridden by each topology's name.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    # Compilation needs no device, so several processes may use libtpu concurrently.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Topology:
    """Devices that a program can be compiled for.

    `chip` is None for CPU devices, whose memory and speed are this machine's.
    """

    name: str
    devices: tuple[Any, ...]
    devices_per_chip: int
    chip: Chip | None

    @property
    def memory_bytes(self) -> int | None:
        """A device's memory in bytes, or None for CPU devices."""
        return None if self.chip is None else self.chip.memory_bytes // self.devices_per_chip

    @property
    def flops(self) -> float | None:
        """A device's matrix operations per second in bfloat16, or None for CPU devices."""
        return None if self.chip is None else self.chip.flops / self.devices_per_chip

    @property
    def device_kind(self) -> str:
        """What JAX calls a device of this kind, there and where it is real."""
        return str(self.devices[0].device_kind)

    @property
    def link_rate(self) -> float:
        """The bytes per second that a device can send over one link, one way; a GPU sends through all its links."""
        if self.chip is None:
            raise ValueError("CPU devices have no links.")
        return self.chip.link_rate / (self.chip.links * self.devices_per_chip if self.chip.ring else 1)

    def ring_rate(self, members: int) -> float:
        """Return the bytes per second that a device can send to its neighbours in a group, one way.

        A dimension of a slice gives every chip at least one link to a neighbour, and two where it is closed to a ring:
        the chips in the corners, which the others wait for, have no more. A group smaller than the slice is taken for a
        ring, two links; the devices of a chip share them.

        Sources: https://cloud.google.com/tpu/docs/v5p and /v4 (4x4x4 and larger slices are a full torus), /v5e, /v6e
        (a pod of 16x16 is one). A GPU reaches the others through all its links.
        """
        if self.chip is None:
            raise ValueError("CPU devices have no links.")
        if not self.chip.ring:
            return self.link_rate
        sizes = [int(size) for size in self.name.partition(":")[2].split("x")]
        closed = all(size >= self.chip.ring for size in sizes) if len(sizes) == 3 else None
        links = 0
        for size in sizes:
            links += 0 if size == 1 else 2 if size >= self.chip.ring and closed is not False else 1
        if members < len(self.devices):
            links = min(links, 2)
        return self.link_rate * max(links, 1)


def cpu_devices(name: str) -> int | None:
    """Return the number of devices of a `cpu:8`, or None for another kind of topology."""
    found = re.fullmatch(r"cpu:([1-9]\d{0,3})", name)
    return int(found[1]) if found else None


def describe(name: str) -> Topology:
    """Return the devices of a topology; `devices.configure` must have been called, for as many as a `cpu:N` needs.

    Args:
        name: `v3:2x2`, `v5e:2x4`, `v5p:2x2x1`, ..., `h100:8` or `cpu:8`.

    Raises:
        StageError: no such topology, or its compiler is not installed; the message names what there is.
    """
    count = cpu_devices(name)
    if count is not None:
        return Topology(name, tuple(jax.devices("cpu")[:count]), 1, None)
    kind = name.partition(":")[0]
    if kind not in CHIPS:
        raise StageError(f"A topology must be one that a compiler knows. Received: topology={name}. {_known()}")
    if kind in gpus.GPUS:
        return Topology(name, gpus.describe(name), 1, CHIPS[kind])
    if importlib.util.find_spec("libtpu") is None:
        raise StageError(
            f"The TPU compiler is in the package libtpu, which is not installed (it exists for Linux only). Received: "
            f"topology={name}. Run `pip install libtpu==0.0.42`, or plan for cpu:8."
        )
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        # Its own type is JaxRuntimeError for all reasons; the first line says which.
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise StageError(
            f"A topology must be one that the TPU compiler knows: {reason}. Received: topology={name}. {_known()}"
        ) from error
    devices = tuple(found.devices)
    per_chip = len({device.core_on_chip for device in devices})
    return Topology(name, devices, per_chip, CHIPS[kind])


@contextlib.contextmanager
def program_cache_off() -> Iterator[None]:
    """Within the block JAX neither keeps compiled programs nor looks for kept ones: those for an absent TPU
    cannot be read again (jax 0.10.2 warns of it each time)."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _known() -> str:
    names = [f"{kind}:{shape}" for kind, shapes in EXAMPLES.items() for shape in shapes]
    names += [f"{kind}:8" for kind in gpus.GPUS]
    return f"There are for example {', '.join(names)}, and cpu:N."
