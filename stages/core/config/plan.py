"""The section `plan`: the steps that the compilers of TPUs and GPUs are asked about."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.core.config.section import BatchSize, Dtype, Length, Positive, Rule, Section
from stages.core.records.layout import OverBatch

MeshList = Annotated[list[Positive], Field(min_length=2, max_length=2)]
TopologyName = Annotated[str, Field(pattern=r"^[a-z0-9-]+:[0-9x]+$")]


class PlanStep(Section):
    """A train step to plan for; what it leaves out (null) is as in the other sections."""

    preset: Annotated[str, Field(min_length=1)] | None = None
    dtype: Dtype | None = None
    length: Length | None = None
    rank: Annotated[int, Field(ge=0, le=512)] | None = None
    lora_targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    rematerialize: bool | None = None


class PlanTarget(PlanStep):
    """A step on a mesh of a topology's devices."""

    topology: TopologyName
    mesh: MeshList | None = None
    layout: Literal["auto", "tutorial", "rules"] | None = None
    rules: Annotated[list[Rule], Field(min_length=1)] | None = None
    shard_over_batch: OverBatch | None = None
    batch_size: BatchSize | None = None
    step: Literal["ours", "tutorial"] | None = None

    @model_validator(mode="after")
    def _rules_go_with_their_name(self) -> PlanTarget:
        if (self.layout == "rules") != (self.rules is not None):
            raise ValueError("rules must be given with layout: rules and be left out otherwise")
        return self


class PlanSearch(PlanStep):
    """Meshes, layouts and batches to try on a topology."""

    topology: TopologyName
    meshes: Annotated[list[MeshList], Field(min_length=1)] | None = None
    layouts: Annotated[list[Literal["auto", "tutorial"]], Field(min_length=1)] | None = None
    shard_over_batch: Annotated[list[OverBatch], Field(min_length=1)] | None = None
    largest_batch: BatchSize | None = None


class PlanScaling(PlanStep):
    """One step on more and more chips: the batch axis grows, and the batch with it."""

    topologies: Annotated[list[TopologyName], Field(min_length=1)]
    model_axis: Positive | None = None
    batch_per_row: BatchSize | None = None
    layout: Literal["auto", "tutorial"] | None = None
    shard_over_batch: OverBatch | None = None


class Plan(Section):
    """What the compilers of TPUs and GPUs are asked."""

    targets: list[PlanTarget]
    search: PlanSearch | None
    scaling: PlanScaling | None
    price_per_chip_hour: dict[str, Annotated[float, Field(gt=0, le=1e6)]] | None
