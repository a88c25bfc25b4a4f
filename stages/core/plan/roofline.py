"""The step time's roofline on a chip: a lower bound, never a prediction.

XLA's own `optimal_seconds` is not used: it came out negative for one program.

    lower bound = max(matrix passes / peak, HBM traffic / HBM bandwidth, bytes sent / link bandwidth)
            (roofline model: https://doi.org/10.1145/1498765.1498785, with the interconnect as a third roof)

All three count what the compiled program does on one device. Nothing can be faster; vector work, latencies and waiting
make real steps slower, and each device is assumed to have all of its chip's links. On GPUs a product of float32 numbers
counts at the rate of float32 units, and results that fit in the L2 cache count as no traffic; switches that add up by
themselves (NVLink SHARP) could halve what an all-reduce sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stages.core.plan.topology import Topology


@dataclass(frozen=True)
class Bound:
    """Minimum seconds per step of each of the three; the largest is the bound."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The lower bound of the step time."""
        return max(self.compute, self.memory, self.network)

    @property
    def bound_by(self) -> str:
        """The limiting resource: compute, memory or network."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def lower_bound(topology: Topology, work: Mapping[str, float]) -> Bound | None:
    """Return the bound for one device's work, or None for CPU devices, whose peaks are not in the table.

    Args:
        topology: of the device.
        work: flops, pass_flops, float32_flops, hbm_traffic_bytes and interconnect_bytes of a step, as in `StepCost`.
    """
    chip = topology.chip
    if chip is None:
        return None
    share = topology.devices_per_chip
    if chip.float32_flops is None:
        compute = work["pass_flops"] * share / chip.flops
    else:
        narrow = work["flops"] - work["float32_flops"]
        compute = narrow / chip.flops + work["float32_flops"] / chip.float32_flops
    return Bound(
        compute=compute,
        memory=work["hbm_traffic_bytes"] * share / chip.memory_rate,
        network=work["interconnect_bytes"] / chip.link_rate,
    )
