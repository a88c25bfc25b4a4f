"""What `data/sharding/base.json` and `tuned.json` hold: `load` and `finetune` write them, `report` reads them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stages.core.records.layout import Fallback, MeshShape, OverBatch
from stages.core.records.record import FileRecord, Record


class WeightRow(Record):
    """Weights of one shape that one rule laid out (`rule` None: no rule, replicated).

    `bytes` is all of them once, `bytes_per_device` what one device holds.
    """

    pattern: str
    count: int
    shape: list[int]
    dtype: str
    kind: str
    rule: str | None
    spec: list[str | list[str] | None]
    shard_shape: list[int]
    bytes: int
    bytes_per_device: int
    replicated: bool


class Sharding(FileRecord):
    """How a variant was sharded over the mesh; sizes in bytes.

    `bytes` and `replicated_fraction` are of the model, which is weights and LoRA; what a device holds, by kind and in
    all, counts the optimizer's state too. `replicated_bytes` is what a device holds that no axis but the batch axis
    splits. `shard_over_batch` is left out of the file where it is nothing.
    """

    preset: str
    mesh: MeshShape
    layout: str
    shard_over_batch: Annotated[OverBatch, Field(exclude_if=lambda value: value == "none")] = "none"
    dtype: str
    parameters: int
    trainable_parameters: int
    bytes: int
    bytes_per_device: int
    replicated_bytes: int
    replicated_fraction: float
    by_kind: dict[str, int]
    weights: list[WeightRow]
    fallbacks: list[Fallback]

    @property
    def times_a_device(self) -> float | None:
        """How many times the model is what a device holds of it, or None where a device holds nothing."""
        held = self.bytes_per_device - self.by_kind.get("optimizer", 0)
        return self.bytes / held if held > 0 else None
