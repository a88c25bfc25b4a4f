"""The layout engine: rules over weight paths, resolved against real shapes and a mesh before anything is allocated.

Purpose: what Keras does silently with a mistyped rule (nothing: the weight is replicated) stops here with one message.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.core.common.errors import StageError
from stages.core.records.layout import AXES, Axis, MeshShape, NamedLayout, Rule, Spec

logger = logging.getLogger(__name__)

ITEM_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int32": 32, "int8": 8, "int4": 4}
# What turns codes into values: see load/quantizing.py.
SCALE = re.compile(r"(.*/(?:kernel|embeddings|gate_proj|up_proj|down_proj))_(?:scale|offset)")


@dataclass(frozen=True)
class Weight:
    """A weight before it exists. `kind`: weight, lora or optimizer."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    kind: str = "weight"

    @property
    def bytes(self) -> int:
        """Bytes of one whole copy."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8

    @property
    def scale_of(self) -> str | None:
        """The path of the codes whose scales (or offsets) these are, None of any other weight."""
        found = SCALE.fullmatch(self.path)
        return found[1] if found else None

    @property
    def parameters(self) -> int:
        """How many numbers of the model it has: a scale belongs to the numbers that it scales."""
        return 0 if self.scale_of else math.prod(self.shape)


@dataclass(frozen=True)
class Placement:
    """A weight's placement: the rule that matched (None: no rule, replicated), its spec and what a device holds.

    `over_batch` is the dimension that is split over the batch axis in addition to what the rule says, None: none is.
    Such a weight is gathered over that axis before it is used.
    """

    weight: Weight
    rule: Rule | None
    spec: Spec
    shard_shape: tuple[int, ...]
    over_batch: int | None = None

    @property
    def bytes_per_device(self) -> int:
        """Bytes that each device holds."""
        return math.prod(self.shard_shape) * ITEM_BITS[self.weight.dtype] // 8

    @property
    def used(self) -> Spec:
        """How the weight is split where it is used: as its rule says."""
        return self.spec if self.over_batch is None else _spec_of(self.rule, len(self.spec))

    def splits(self, axis: str) -> bool:
        """Whether the weight is split over a mesh axis."""
        return any(axis in axes_of(entry) for entry in self.spec)


def axes_of(entry: Axis) -> tuple[str, ...]:
    """Return a spec entry as a tuple of axis names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def as_spec(entries: Sequence[Any]) -> Spec:
    """Return a spec from YAML or JSON, where a dimension over two axes is a list."""
    return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in entries)


def resolve(rules: Sequence[Rule], weights: Iterable[Weight], mesh: MeshShape) -> list[Placement]:
    """Place every weight, or stop with one message that names path, shape, rule and mesh.

    Args:
        rules: each weight may match at most one; a weight that matches none is replicated. Scales of codes follow
            them.
        weights: the model's weights with LoRA and optimizer slots, codes before their scales.
        mesh: axis names and sizes.

    Raises:
        StageError: a pattern that is no regular expression or matches nothing (one that names `lora` may, while no
            weight is a LoRA kernel), two rules on one weight, a wrong number
            of dimensions, an unknown axis, an axis used twice, a dimension that the axis does not divide.
    """
    compiled = []
    for rule in rules:
        try:
            compiled.append(re.compile(rule.anchored))
        except re.error as error:
            raise StageError(
                f"A layout pattern must be a regular expression: {error}. Received: pattern={rule.pattern!r}."
            ) from error
    used = [False] * len(rules)
    placements: list[Placement] = []
    placed: dict[str, Placement] = {}
    paths = []
    has_adapter = False
    for weight in weights:
        if weight.scale_of:
            placements.append(_beside_codes(weight, placed[weight.scale_of], mesh))
            continue
        paths.append(weight.path)
        has_adapter |= weight.kind == "lora"
        matches = [index for index, pattern in enumerate(compiled) if pattern.search(weight.path)]
        if len(matches) > 1:
            raise StageError(
                f"A weight may match one layout rule only. Received: path={weight.path}, shape={weight.shape}, rules="
                f"{[rules[index].pattern for index in matches]}, mesh={mesh}. Narrow one of them."
            )
        if matches:
            used[matches[0]] = True
        placements.append(place(weight, rules[matches[0]] if matches else None, mesh))
        placed[weight.path] = placements[-1]
    for rule, was_used in zip(rules, used, strict=True):
        # A rule for LoRA kernels matches nothing before there are any: the load stage shards the base alone.
        premature = "lora" in rule.pattern and not has_adapter
        if not was_used and not rule.optional and not premature:
            example = next(
                (path for path in paths if rule.pattern.split("/")[-1] in path), paths[0] if paths else "none"
            )
            raise StageError(
                f"Every layout rule must match a whole weight path, and this one matches nothing, so what it was meant "
                f"for would be replicated. Received: pattern={rule.pattern!r}, spec={format_spec(rule.spec)}, "
                f"mesh={mesh}. A path of this model: {example}"
            )
    return placements


def _beside_codes(scale: Weight, codes: Placement, mesh: MeshShape) -> Placement:
    """Place scales: split as their codes are, but not along a dimension of which all have one scale.

    So a device has the scales of all groups that it has codes of; a dimension that would part a group is refused.
    """
    if codes.rule is None:
        return place(scale, None, mesh)
    spec = tuple(None if size == 1 else axis for size, axis in zip(scale.shape, codes.rule.spec, strict=True))
    return place(scale, dataclasses.replace(codes.rule, spec=spec), mesh)


def lay_out(layout: NamedLayout, weights: Iterable[Weight], mesh: MeshShape) -> list[Placement]:
    """Place every weight by the layout's rules, over the batch axis too where the layout says so.

    Args:
        layout: from `make_layout`.
        weights: the model's, LoRA kernels included.
        mesh: axis names and sizes.

    Raises:
        StageError: as `resolve`.
    """
    placements = resolve(layout.rules, weights, mesh)
    return [split_over_batch(each, mesh) for each in placements] if layout.shard_over_batch == "weights" else placements


def lay_out_slot(layout: NamedLayout, slot: Weight, owner: Placement, mesh: MeshShape) -> Placement:
    """Place a slot of the optimizer, which has its weight's shape, as its weight or also over the batch axis."""
    placement = place(slot, owner.rule, mesh)
    return placement if layout.shard_over_batch == "none" else split_over_batch(placement, mesh)


def split_over_batch(placement: Placement, mesh: MeshShape) -> Placement:
    """Return a placement that is split over the batch axis too, in the dimension in which that is cheapest to gather.

    Not the last dimension if another divides: its numbers are in rows of 128 on a TPU, which gathering would cut. A
    dimension that no axis splits comes before one that the model axis splits, and a longer one before a shorter.
    Weights of one dimension (norm scales, of a few kilobytes) and those that nothing divides stay as they are, as does
    what a rule of the user splits over the batch axis already.
    """
    axis, shape = AXES[0], placement.shard_shape
    size = mesh.sizes[axis]
    if size == 1 or len(shape) < 2 or placement.splits(axis):
        return placement
    fitting = [each for each, length in enumerate(shape) if length % size == 0]
    if not fitting:
        return placement
    last = len(shape) - 1
    chosen = min(fitting, key=lambda each: (each == last, bool(axes_of(placement.spec[each])), -shape[each]))
    # The model axis is the outer one, so that a gathered part is what the rule says of it.
    axes = (*axes_of(placement.spec[chosen]), axis)
    spec = [*placement.spec]
    spec[chosen] = axes if len(axes) > 1 else axis
    part = [*shape]
    part[chosen] //= size
    return replace(placement, spec=tuple(spec), shard_shape=tuple(part), over_batch=chosen)


def _spec_of(rule: Rule | None, dimensions: int) -> Spec:
    """Return the spec of a rule, or of a weight that none matches."""
    return rule.spec if rule else (None,) * dimensions


def check_adapters(rules: Sequence[Rule], weights: Iterable[Weight], mesh: MeshShape) -> None:
    """Warn of each rule that fits no LoRA kernel it matches, as far as that follows from the base alone.

    Which layers get an adapter, and of which rank, is not known yet. A rule that is meant for LoRA kernels (its pattern
    names `lora`) must fit what it matches of some layer; the rank may be any that the mesh divides.

    Args:
        rules: a user's own; optional ones are passed over.
        weights: the model's, with no adapter declared.
        mesh: axis names and sizes.

    Raises:
        StageError: a rule that is meant for LoRA kernels fits none of any layer.
    """
    rank = mesh.devices
    adapters = [
        [
            Weight(f"{layer}/lora_kernel_a", (*each.shape[:-1], rank), "float32", "lora"),
            Weight(f"{layer}/lora_kernel_b", (rank, each.shape[-1]), "float32", "lora"),
        ]
        for each in weights
        for layer, _, name in [each.path.rpartition("/")]
        if name == "kernel"
    ]
    for rule in rules:
        pattern, meant = re.compile(rule.anchored), "lora" in rule.pattern
        matches = [found for pair in adapters if (found := [each for each in pair if pattern.search(each.path)])]
        if meant and not matches:
            raise StageError(
                f"A layout rule for LoRA kernels must match those of some layer, and this one matches none. Received: "
                f"pattern={rule.pattern!r}. A path of this model: {adapters[0][0].path}"
            )
        problems = [problem for found in matches if (problem := _problem(found, rule, mesh))]
        if rule.optional or len(problems) < len(matches) or not matches:
            continue
        if meant:
            raise StageError(f"{problems[0]} So it is with any LoRA rank; {rank} is taken here.")
        logger.warning(
            f"the layout rule {rule.pattern!r} matches LoRA kernels too, such as {matches[0][0].path}, and "
            "fits no layer's: finetune stops if these layers get an adapter. End the pattern in /kernel."
        )


def _problem(weights: Iterable[Weight], rule: Rule, mesh: MeshShape) -> StageError | None:
    """Return why a rule does not fit one of some weights, or None if it fits all."""
    try:
        for weight in weights:
            place(weight, rule, mesh)
    except StageError as error:
        return error
    return None


def place(weight: Weight, rule: Rule | None, mesh: MeshShape) -> Placement:
    """Place one weight by one rule, checked."""
    spec = _spec_of(rule, len(weight.shape))
    received = (
        f"Received: path={weight.path}, shape={weight.shape}, rule={rule.pattern if rule else None!r}, "
        f"spec={format_spec(spec)}, mesh={mesh}."
    )
    if len(spec) != len(weight.shape):
        raise StageError(
            f"A layout rule must have one entry for each of the weight's {len(weight.shape)} dimensions. {received}"
        )
    seen: list[str] = []
    shard_shape = []
    for dimension, (size, entry) in enumerate(zip(weight.shape, spec, strict=True)):
        parts = 1
        for axis in axes_of(entry):
            if axis not in mesh.sizes:
                raise StageError(f"{axis!r} is not a mesh axis; the axes are {', '.join(mesh.sizes)}. {received}")
            if axis in seen:
                raise StageError(f"A layout rule may use an axis once; {axis!r} is there twice. {received}")
            seen.append(axis)
            parts *= mesh.sizes[axis]
        if size % parts:
            raise StageError(
                f"Dimension {dimension} of size {size} must be divisible by the {parts} devices of its axes. {received}"
            )
        shard_shape.append(size // parts)
    return Placement(weight, rule, spec, tuple(shard_shape))


def format_spec(spec: Spec) -> str:
    """Return a spec as JAX prints it: `PartitionSpec(None, 'model', None)`."""
    return "PartitionSpec(" + ", ".join(repr(entry) for entry in spec) + ")"


def replicated_fraction(placements: Sequence[Placement], mesh: MeshShape, axis: str = "model") -> float:
    """Return the fraction of the weights' bytes replicated along `axis`: 0.0 if the axis has one device.

    Replication along the batch axis is data parallelism, and does not count.
    """
    if mesh.sizes[axis] == 1:
        return 0.0
    total = sum(placement.weight.bytes for placement in placements)
    return sum(placement.weight.bytes for placement in placements if not placement.splits(axis)) / total


def check_replication(
    placements: Sequence[Placement], mesh: MeshShape, limit: float, advice: Callable[[], str] | None = None
) -> float:
    """Return the replicated fraction, or stop if it is beyond `limit` and list the largest replicated weights.

    `advice` returns what to do about it; by default that is to shard them in the layout.
    """
    fraction = replicated_fraction(placements, mesh)
    if fraction <= limit:
        return fraction
    replicated = sorted(
        (placement for placement in placements if not placement.splits("model")), key=lambda each: -each.weight.bytes
    )
    listed = "; ".join(f"{each.weight.path} {each.weight.shape} {each.weight.bytes:,} bytes" for each in replicated[:5])
    raise StageError(
        f"At most layout.max_replicated_fraction of the weights may be replicated along the axis 'model'. "
        f"Received: {fraction:.4f} > {limit} on mesh={mesh}. Largest: {listed}. "
        f"{advice() if advice else 'Split them in the layout'}, or raise the limit."
    )
