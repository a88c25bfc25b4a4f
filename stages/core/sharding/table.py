"""The sharding report as data: one row per weight pattern, so that the file can be read, compared and kept in Git.

Purpose: from resolved placements to `data/sharding/*.json` and to the table that the tutorial prints.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from stages.core.records.forms import CODES
from stages.core.records.layout import MeshShape, NamedLayout
from stages.core.records.sharding import Sharding, WeightRow
from stages.core.sharding.layout import ITEM_BITS, Placement, format_spec, replicated_fraction


def report(
    placements: Sequence[Placement],
    mesh: MeshShape,
    *,
    preset: str,
    layout: NamedLayout,
    dtype: str,
    trainable_parameters: int,
) -> Sharding:
    """Return the whole report: sums, one row per weight pattern, and the fallbacks with their reasons.

    Args:
        placements: of the weights, LoRA kernels and optimizer slots.
        mesh: with the platform of its devices.
        preset: its name.
        layout: that placed them.
        dtype: of the model.
        trainable_parameters: 0 where nothing is trained.
    """
    model = [each for each in placements if each.weight.kind != "optimizer"]
    kinds: dict[str, int] = {}
    for each in placements:
        kinds[each.weight.kind] = kinds.get(each.weight.kind, 0) + each.bytes_per_device
    split_matters = mesh.sizes["model"] > 1
    return Sharding(
        preset=preset,
        mesh=mesh,
        layout=layout.name,
        shard_over_batch=layout.shard_over_batch,
        dtype=dtype,
        parameters=sum(each.weight.parameters for each in model),
        trainable_parameters=trainable_parameters,
        bytes=sum(each.weight.bytes for each in model),
        bytes_per_device=sum(each.bytes_per_device for each in placements),
        replicated_bytes=sum(
            each.bytes_per_device for each in placements if split_matters and not each.splits("model")
        ),
        replicated_fraction=round(replicated_fraction(model, mesh), 6),
        by_kind=kinds,
        weights=rows(placements, mesh),
        fallbacks=list(layout.fallbacks),
    )


def rows(placements: Sequence[Placement], mesh: MeshShape) -> list[WeightRow]:
    """Return a row for each weight pattern (block numbers collapsed to `*`), in the model's order."""
    grouped: dict[tuple[Any, ...], list[Placement]] = {}
    for each in placements:
        pattern = re.sub(r"(decoder_block_)\d+", r"\1*", each.weight.path)
        key = (pattern, each.weight.shape, each.weight.dtype, each.spec, each.rule)
        grouped.setdefault(key, []).append(each)
    return [
        WeightRow(
            pattern=pattern,
            count=len(group),
            shape=list(shape),
            dtype=dtype,
            kind=group[0].weight.kind,
            rule=rule.pattern if rule else None,
            spec=[list(entry) if isinstance(entry, tuple) else entry for entry in spec],
            shard_shape=list(group[0].shard_shape),
            bytes=sum(each.weight.bytes for each in group),
            bytes_per_device=sum(each.bytes_per_device for each in group),
            replicated=mesh.sizes["model"] > 1 and not group[0].splits("model"),
        )
        for (pattern, shape, dtype, spec, rule), group in grouped.items()
    ]


def quantized_sizes(placements: Sequence[Placement]) -> str | None:
    """Return what codes save, and what else there is, in a sentence; None where there are no codes."""
    weights = [each.weight for each in placements if each.weight.kind == "weight"]
    codes = {kind: [each for each in weights if each.dtype == kind] for kind in CODES}
    if not any(codes.values()):
        return None
    rest = [each for each in weights if each.dtype not in CODES and not each.scale_of]
    dtype = rest[0].dtype
    whole = sum(each.parameters for each in weights) * ITEM_BITS[dtype] // 8
    kept = " and the token table" if any(each.path.endswith("/embeddings") for each in rest) else ""
    told = [f"codes of {CODES[kind]} {sum(each.bytes for each in held):,}" for kind, held in codes.items() if held]
    return (
        f"Weights in all: {sum(each.bytes for each in weights):,} bytes, {whole:,} if all were {dtype}. "
        f"{', '.join(told).capitalize()}, their scales "
        f"{sum(each.bytes for each in weights if each.scale_of):,}, norms{kept} in {dtype} "
        f"{sum(each.bytes for each in rest):,}."
    )


def block_table(placements: Sequence[Placement], block: str = "decoder_block_1") -> str:
    """Return the tutorial's table of embedding and one block: path, shape and PartitionSpec, one line per weight."""
    chosen = [
        each
        for each in placements
        if each.weight.kind != "optimizer" and each.weight.path.startswith(("token_embedding/", f"{block}/"))
    ]
    return "\n".join(f"{each.weight.path:<58}  {each.weight.shape!s:<16}  {format_spec(each.spec)}" for each in chosen)
