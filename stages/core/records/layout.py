"""The mesh, the layout and the adapter as `models/<variant>/model.json` and `data/sharding/*.json` hold them.

Purpose: what the settings decided travels as one type each, in memory and in files. What they mean for weights is in
`sharding/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

# The tutorial's names, in the order of `mesh.shape`.
AXES = ("batch", "model")

# What is split over the batch axis too, which otherwise holds whole copies: nothing, AdamW's state (ZeRO-1), or the
# trained and frozen weights with it (FSDP).
OverBatch = Literal["none", "optimizer", "weights"]

Axis = str | tuple[str, ...] | None
Spec = tuple[Axis, ...]


@dataclass(frozen=True)
class MeshShape:
    """The mesh as numbers: enough to resolve a layout, without any device.

    `device_kind` is auto, simulated or real, as in `mesh.devices`; in `data/sharding/` the platform that it came to.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    shape: Annotated[tuple[int, ...], Field(min_length=1, max_length=2)]
    axis_names: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] = AXES
    device_kind: Annotated[str, Field(alias="devices")] = "auto"

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis."""
        return dict(zip(self.axis_names, self.shape, strict=True))

    @property
    def devices(self) -> int:
        """Devices in all."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return "(" + ", ".join(f"{name}={size}" for name, size in self.sizes.items()) + ")"


@dataclass(frozen=True)
class Rule:
    """Weights whose whole path matches `pattern` are split as `spec` says: an axis, several, or None per dimension.

    `optional` rules may match nothing (a named layout serves several Gemmas); a user's own rules may not.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    pattern: str
    spec: Spec
    optional: bool = False

    @property
    def anchored(self) -> str:
        """The pattern as Keras must get it: the same under `re.fullmatch` (since 3.14) and `re.search` (before)."""
        return f"^(?:{self.pattern})$"


@dataclass(frozen=True)
class Fallback:
    """A weight that could not be split as it would be on a mesh that divides it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    pattern: str
    wanted: str
    used: str
    reason: str

    def __str__(self) -> str:
        where = self.used if self.used == "replicated" else f"split over {self.used}"
        return f"{self.pattern} {where}, since {self.reason}."


@dataclass(frozen=True)
class NamedLayout:
    """Rules, the weights that had to be split otherwise than one would, and what is split over the batch axis too.

    Files leave the last out where it is nothing.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    rules: tuple[Rule, ...]
    fallbacks: tuple[Fallback, ...] = ()
    shard_over_batch: Annotated[OverBatch, Field(exclude_if=lambda value: value == "none")] = "none"


@dataclass(frozen=True)
class LoraConfig:
    """What is trained: adapters of a rank on the layers that match a target; with rank 0 every weight, without them.

    An alpha of None is the rank, as in Keras; rank 0 has neither alpha nor targets.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        alpha = float(self.rank) if self.alpha is None else self.alpha
        object.__setattr__(self, "alpha", alpha if self.rank else None)
        object.__setattr__(self, "targets", tuple(self.targets) if self.rank else ())

    @property
    def scale(self) -> float:
        """What A B is multiplied with."""
        return self.alpha / self.rank if self.alpha else 0.0
