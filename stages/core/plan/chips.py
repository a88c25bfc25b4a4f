"""Peak rates of the chips, with their sources.

Purpose: the one table of peak rates; `stages.core.plan.roofline` divides by them and by nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A TPU chip's peaks.

    `flops`: bfloat16 matrix operations per second. A product of float32 numbers runs through the same units six
    times (`program_costs.ProgramCosts.pass_flops`). `memory_bytes` and `memory_rate` (bytes per second): its HBM.
    `link_rate`: bytes per second that the chip can send to its neighbours over all its links together, one way.
    """

    flops: float
    memory_bytes: int
    memory_rate: float
    link_rate: float
    source: str


GIB = 2**30
# Google states interconnect per chip in Gbit/s of all links, or in GB/s of both directions; here bytes one way.
CHIPS: dict[str, Chip] = {
    "v2": Chip(45e12, 16 * GIB, 700e9, 4 * 496e9 / 8, "Norrie et al., IEEE Micro 41(2), 2021, table 1"),
    "v3": Chip(123e12, 32 * GIB, 900e9, 4 * 656e9 / 8, "Norrie et al., IEEE Micro 41(2), 2021, table 1"),
    "v4": Chip(275e12, 32 * GIB, 1228e9, 6 * 50e9, "Jouppi et al., ISCA 2023, https://arxiv.org/abs/2304.01433"),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 1600e9 / 8, "https://cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 4800e9 / 8, "https://cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 3200e9 / 8, "https://cloud.google.com/tpu/docs/v6e"),
}
