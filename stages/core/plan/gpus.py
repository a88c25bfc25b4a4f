"""GPUs described to XLA, so that a program can be compiled for them on a machine that has none.

Purpose: the only module that knows the form of XLA's description of a GPU (`GpuTargetConfigProto`, as text) and the
package its compiler comes in. No driver is asked, and no kernel is timed: of the ways to do a matrix product the
compiler takes its first choice.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from jax.experimental import topologies

from stages.core.common.errors import StageError
from stages.core.common.stderr import quiet_standard_error
from stages.core.plan.chips import CHIPS

# GPUs that share an NVLink switch or a board: what one host has.
MOST = 8
# The version of cuDNN that JAX's plugin is built for at the least; no program here calls it.
CUDNN = (9, 8, 0)
PLUGIN = "jax_plugins.xla_cuda12"


@dataclass(frozen=True)
class Generation:
    """What the GPUs of a compute capability have in common.

    Source: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities, "Technical specifications". A
    core is a streaming multiprocessor; shared memory in KiB.
    """

    major: int
    minor: int
    threads_per_core: int
    shared_per_core: int
    shared_per_block: int
    units_per_core: int


@dataclass(frozen=True)
class Gpu:
    """A GPU: the name that CUDA gives it, its generation, cores and boost clock (GHz), as NVIDIA states them."""

    name: str
    generation: Generation
    cores: int
    clock: float


TURING = Generation(7, 5, 1024, 64, 64, 64)
AMPERE = Generation(8, 0, 2048, 164, 163, 64)
ADA = Generation(8, 9, 1536, 100, 99, 128)
HOPPER = Generation(9, 0, 2048, 228, 227, 128)
BLACKWELL = Generation(10, 0, 2048, 228, 227, 128)
GPUS = {
    "t4": Gpu("Tesla T4", TURING, 40, 1.59),
    "l4": Gpu("NVIDIA L4", ADA, 58, 2.04),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", AMPERE, 108, 1.41),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", AMPERE, 108, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", HOPPER, 132, 1.98),
    "h200": Gpu("NVIDIA H200", HOPPER, 132, 1.98),
    "b200": Gpu("NVIDIA B200", BLACKWELL, 148, 1.965),
}


def describe(name: str) -> tuple[Any, ...]:
    """Return the devices of a topology such as `h100:8`: eight GPUs of one host.

    Raises:
        StageError: more than a host has, or XLA's compiler for GPUs is not installed.
    """
    kind, _, count = name.partition(":")
    if not re.fullmatch(f"[1-{MOST}]", count):
        raise StageError(
            f"A topology of GPUs must be one host's, 1 to {MOST}, such as {kind}:8. Received: topology={name}"
        )
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec(PLUGIN) is None:
        raise StageError(
            f"XLA's compiler for GPUs is in JAX's CUDA plugin, which is not installed (it needs no GPU). Received: "
            f"topology={name}. Run `pip install --no-deps -r requirements-gpu-plan.txt`, made for jax "
            f"{version('jax')}, or plan for cpu:{count}."
        )
    # The plugin would refuse to load where there is no driver and no cuDNN, which compiling does not need, and notes
    # that there is no GPU.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    try:
        with quiet_standard_error():
            found = topologies.get_topology_desc("", "cuda", target_config=description(kind), topology=f"1x1x{count}")
    except Exception as error:
        raise StageError(
            f"XLA's compiler for GPUs must take the topology; it says: {str(error).splitlines()[0][:300]}. Received: "
            f"topology={name}"
        ) from error
    return tuple(found.devices)


def description(kind: str) -> str:
    """Return a GPU as XLA's `GpuTargetConfigProto` in text form."""
    gpu, chip = GPUS[kind], CHIPS[kind]
    each = gpu.generation
    numbers = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": each.shared_per_core * 1024,
        "shared_memory_per_block_optin": each.shared_per_block * 1024,
        "threads_per_core_limit": each.threads_per_core,
        "core_count": gpu.cores,
        "fpus_per_core": each.units_per_core,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": round(chip.memory_rate),
        "l2_cache_size": chip.cache_bytes,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": chip.memory_bytes,
    }
    info = " ".join(f"{key}: {value}" for key, value in numbers.items())
    capability = f"cuda_compute_capability {{ major: {each.major} minor: {each.minor} }}"
    cudnn = "dnn_version_info {{ major: {} minor: {} patch: {} }}".format(*CUDNN)
    text = f'platform_name: "CUDA" {cudnn} device_description_str: "{gpu.name}"'
    return f"gpu_device_info {{ {info} {capability} }} {text}"
