"""What `data/sharding/plan.json` holds: `plan` writes it, `report` and runs read it.

Unless a name says otherwise, sizes are bytes per device, counts are per step, and times are seconds per step.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from stages.core.records.layout import Fallback, NamedLayout, OverBatch
from stages.core.records.record import FileRecord, Record

ShardOverBatch = Annotated[OverBatch, Field(exclude_if=lambda value: value == "none")]


class RunKey(Record):
    """What distinguishes one training step from another; None: not known."""

    preset: str | None = None
    mesh: list[int] | None = None
    layout: str | None = None
    rules: list[tuple[str, list[Any]]] | None = None
    # Left out of files where it is nothing.
    shard_over_batch: ShardOverBatch = "none"
    dtype: str | None = None
    batch_size: int | None = None
    length: int | None = None
    rank: int | None = None
    lora_targets: list[str] | None = None
    rematerialize: bool | None = None
    step: str | None = None

    def matches(self, other: RunKey) -> bool:
        """Return whether all that is known of this step is the same of the other."""
        return all(getattr(self, key) in (None, getattr(other, key)) for key in RunKey.model_fields)

    def positions(self) -> int:
        """Return how many positions of a sequence a batch has; 0 where that is not known."""
        return (self.batch_size or 0) * (self.length or 0)


def rules_of(layout: NamedLayout) -> list[tuple[str, list[Any]]] | None:
    """Return the rules of a layout that its name does not imply, as `RunKey` has them; None for a named one."""
    if layout.name != "rules":
        return None
    return [
        (rule.pattern, [list(axes) if isinstance(axes, tuple) else axes for axes in rule.spec]) for rule in layout.rules
    ]


class Collective(Record):
    """Collectives of one kind in a compiled step: how many, their operands' bytes, and what a device sends."""

    count: int
    bytes: int
    wire_bytes: int = 0


class StepTime(Record):
    """Seconds of a step on one device, by what they are spent on; see `stages.core.plan.step_time`.

    Attributes:
        products: matrix products of the blocks' projections, with what the compiler fused into them.
        attention: logits, softmax, their products with keys and values, rotary embeddings.
        head: the product with the embedding table, and the loss.
        norms: RMS norms.
        copies: what only moves data: copies, transposes, slices.
        other: everything else on the core, such as activation functions and the optimizer.
        network: waiting for collectives that nothing on the core hides.
    """

    products: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    norms: float = 0.0
    copies: float = 0.0
    other: float = 0.0
    network: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.model_dump().values())


class Buffer(Record):
    """One of the largest buffers of a compiled step."""

    bytes: int
    shape: str
    operator: str


class Target(RunKey):
    """A compiled training step on a topology.

    Attributes:
        device_kind: what JAX calls a device of the topology, there and where it is real.
        chips: of the topology that the mesh uses; a chip of some TPUs is two devices.
        estimated_step_seconds: see `StepTime`; no less than the lower bound. None where the compiler does not say.
        share_of_peak: of that time, what the matrix products take at the chip's peak rate.
        price_per_chip_hour: of the settings, in their currency.
    """

    topology: str
    device_kind: str = ""
    devices: int
    chips: int = 0
    parameters: int = 0
    trainable_parameters: int = 0
    fits: bool
    argument_bytes_per_device: int | None = None
    weight_bytes_per_device: int = 0
    lora_bytes_per_device: int = 0
    optimizer_bytes_per_device: int = 0
    batch_bytes_per_device: int = 0
    temporary_bytes_per_device: int | None = None
    output_bytes_per_device: int | None = None
    aliased_bytes_per_device: int | None = None
    needed_bytes_per_device: int | None = None
    hbm_bytes_per_device: int | None = None
    flops_per_step: int | None = None
    hbm_traffic_bytes_per_step: int | None = None
    collectives: dict[str, Collective] = Field(default_factory=dict)
    collective_bytes_per_step: int = 0
    interconnect_bytes_per_step: int | None = None
    step_seconds_lower_bound: float | None = None
    bound_by: str | None = None
    compute_seconds: float | None = None
    memory_seconds: float | None = None
    network_seconds: float | None = None
    estimated_step_seconds: float | None = None
    step_time: StepTime | None = None
    share_of_peak: float | None = None
    price_per_chip_hour: float | None = None
    compile_seconds: float | None = None
    largest: list[Buffer] = Field(default_factory=list)
    fallbacks: list[Fallback] = Field(default_factory=list)
    # Rows of `sharding.WeightRow` as plain values: whole, where a figure that is not known is left out elsewhere.
    weights: list[dict[str, Any]] = Field(default_factory=list)


class Estimate(Record):
    """What a step needs with one mesh, layout and batch size: compiled whole, or extrapolated from few blocks."""

    name: str = ""
    topology: str = ""
    devices: int = 0
    mesh: list[int]
    layout: str
    shard_over_batch: ShardOverBatch = "none"
    batch_size: int | None = None
    largest_batch: int | None = None
    compiled: bool = False
    fits: bool
    reason: str | None = None
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    code_bytes: int | None = None
    needed_bytes: int | None = None
    flops: int | None = None
    pass_flops: int | None = None
    float32_flops: int | None = None
    hbm_traffic_bytes: int | None = None
    interconnect_bytes: int | None = None
    collectives: dict[str, int] = Field(default_factory=dict)
    step_seconds_lower_bound: float | None = None
    bound_by: str | None = None
    estimated_step_seconds: float | None = None
    step_time: StepTime | None = None
    tokens_per_second_upper_bound: float | None = None
    tokens_per_second: float | None = None
    extrapolated: dict[str, float] | None = None

    @property
    def speed(self) -> float:
        """Tokens per second by the estimate, else by the lower bound of the step time; 0.0 where neither is known."""
        return self.tokens_per_second or self.tokens_per_second_upper_bound or 0.0


class Search(Record):
    """All candidates, best first, and every point that was looked at."""

    preset: str
    topology: str
    memory_bytes: int | None = None
    candidates: list[Estimate]
    points: list[Estimate]


class Scaling(Record):
    """One step on more and more chips."""

    preset: str
    rows: list[Estimate]


class PlanFile(FileRecord):
    """`data/sharding/plan.json`."""

    targets: dict[str, Target]
    search: Search | None
    scaling: Scaling | None

    def content(self) -> dict[str, Any]:
        """Return the file's content. Compile times are left out: its bytes follow from the settings alone."""
        left_out = {"targets": {"__all__": {"compile_seconds"}}}
        return {"search": None, "scaling": None} | self.model_dump(exclude_none=True, exclude=left_out)
