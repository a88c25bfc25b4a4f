"""Peak rates of the chips, with their sources.

Purpose: the one table of peak rates; `stages.core.plan.roofline` and `step_time` divide by them and by nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A chip's peaks.

    Attributes:
        flops: bfloat16 matrix operations per second. On a TPU a product of float32 numbers runs through the same units
            six times (`program_costs.ProgramCosts.pass_flops`).
        memory_bytes: of its main memory; for a GPU what CUDA reports to a program, which is less than the name says.
        memory_rate: bytes per second from and to it.
        link_rate: bytes per second that the chip can send over all its links together, one way.
        source: of these figures.
        links: how many links that is.
        ring: TPUs: the length from which a dimension of a slice is closed to a ring.
        clock: TPUs: Hz of the core, by which the compiler's cycles become seconds.
        float32_flops: GPUs: float32 operations per second outside of the matrix units.
        cache_bytes: GPUs: of the L2 cache; what fits in it need not go to the main memory.
    """

    flops: float
    memory_bytes: int
    memory_rate: float
    link_rate: float
    source: str
    links: int = 1
    ring: int = 0
    clock: float = 0.0
    float32_flops: float | None = None
    cache_bytes: int = 0


GIB = 2**30
MIB = 2**20
NORRIE = "Norrie et al., IEEE Micro 41(2), 2021, table 1"
CLOUD = "https://cloud.google.com/tpu/docs"
# Google states interconnect per chip in Gbit/s of all links, or in GB/s of both directions; here bytes one way. The
# clock is the one at which all matrix units (of 128 x 128, from v6e on 256 x 256) give the peak.
CHIPS: dict[str, Chip] = {
    "v2": Chip(45e12, 16 * GIB, 700e9, 4 * 496e9 / 8, NORRIE, 4, 16, 700e6),
    "v3": Chip(123e12, 32 * GIB, 900e9, 4 * 656e9 / 8, NORRIE, 4, 32, 940e6),
    "v4": Chip(
        275e12, 32 * GIB, 1228e9, 6 * 50e9, "Jouppi et al., ISCA 2023, https://arxiv.org/abs/2304.01433", 6, 4, 1050e6
    ),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 1600e9 / 8, f"{CLOUD}/v5e", 4, 16, 1500e6),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 4800e9 / 8, f"{CLOUD}/v5p", 6, 4, 1750e6),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 3200e9 / 8, f"{CLOUD}/v6e", 4, 16, 1750e6),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 1200e9 / 2, f"{CLOUD}/tpu7x", 6, 4, 2200e6),
    # NVIDIA states NVLink and PCIe in GB/s of both directions, and matrix operations with sparsity: here half of each.
    "t4": Chip(
        65e12,
        15109 * MIB,
        320e9,
        32e9 / 2,
        "NVIDIA T4 data sheet, https://www.nvidia.com/en-us/data-center/tesla-t4 (float16: it has no bfloat16 units)",
        float32_flops=8.1e12,
        cache_bytes=4 * MIB,
    ),
    "l4": Chip(
        121e12,
        22698 * MIB,
        300e9,
        64e9 / 2,
        "NVIDIA L4 data sheet, https://www.nvidia.com/en-us/data-center/l4",
        float32_flops=30.3e12,
        cache_bytes=48 * MIB,
    ),
    "a100-40": Chip(
        312e12,
        40326 * MIB,
        1555e9,
        600e9 / 2,
        "NVIDIA A100 data sheet, https://www.nvidia.com/en-us/data-center/a100 (SXM)",
        float32_flops=19.5e12,
        cache_bytes=40 * MIB,
    ),
    "a100-80": Chip(
        312e12,
        81049 * MIB,
        2039e9,
        600e9 / 2,
        "NVIDIA A100 data sheet, https://www.nvidia.com/en-us/data-center/a100 (SXM)",
        float32_flops=19.5e12,
        cache_bytes=40 * MIB,
    ),
    "h100": Chip(
        989.4e12,
        80995 * MIB,
        3352e9,
        900e9 / 2,
        "NVIDIA H100 data sheet, https://www.nvidia.com/en-us/data-center/h100 (SXM)",
        float32_flops=67e12,
        cache_bytes=50 * MIB,
    ),
    "h200": Chip(
        989.4e12,
        143062 * MIB,
        4800e9,
        900e9 / 2,
        "NVIDIA H200 data sheet, https://www.nvidia.com/en-us/data-center/h200 (SXM)",
        float32_flops=67e12,
        cache_bytes=50 * MIB,
    ),
    "b200": Chip(
        2250e12,
        182577 * MIB,
        8000e9,
        1800e9 / 2,
        "NVIDIA HGX B200, https://www.nvidia.com/en-us/data-center/hgx (of eight)",
        float32_flops=75e12,
        cache_bytes=126 * MIB,
    ),
}
