"""Shapes first: what a model, its adapter and its optimizer take on a mesh, from the architecture alone.

Purpose: `python -m stages.load --dry-run`, and `plan`. No weight is read or allocated and no device mesh is built, so
a 27B on 32 devices resolves on any machine.
Reads: the manifest and the preset's configuration, or nothing for a public checkpoint by name. Writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.core.architecture import Architecture, build_backbone, read_architecture
from stages.core.layout import (
    NamedLayout,
    Placement,
    Weight,
    check_replication,
    place,
    replicated_fraction,
    resolve,
)
from stages.core.mesh import MeshShape

if TYPE_CHECKING:
    from stages.core.cli import Run
    from stages.core.paths import Paths

# What AdamW keeps beside each trainable weight (https://arxiv.org/abs/1711.05101), by Keras' names.
SLOTS = ("momentum", "velocity")


def resolve_shapes(
    architecture: Architecture,
    mesh: MeshShape,
    layout: NamedLayout,
    dtype: str,
    tuning: dict[str, Any] | None = None,
) -> list[Placement]:
    """Place every weight, LoRA kernel and optimizer slot of a model that does not exist.

    Keras-hub declares the weights, so `devices.configure` must have been called before; how many devices it was called
    for does not matter.

    Args:
        architecture: class and arguments.
        mesh: axis names and sizes.
        layout: from `make_layout`.
        dtype: a Keras dtype policy name.
        tuning: `rank` (0: every weight is trained), `alpha` and `targets`; None for the weights alone.

    Returns:
        The model's weights in its order, LoRA kernels among them; then momentum and velocity of each trainable weight,
        placed and typed as the weight is.

    Raises:
        StageError: the layout does not fit the weights or the mesh.
    """
    from stages.core import loading, lora

    backbone = build_backbone(architecture, dtype)
    if tuning is not None:
        lora.declare(backbone, tuning["rank"], tuning["alpha"], tuning["targets"])
    placements = resolve(layout.rules, loading.weights_of(backbone), mesh)
    if tuning is None:
        return placements
    trained = {variable.path for variable in backbone.trainable_variables}
    slots = [
        place(Weight(f"{each.weight.path}/{slot}", each.weight.shape, each.weight.dtype, "optimizer"), each.rule, mesh)
        for each in placements
        if each.weight.path in trained
        for slot in SLOTS
    ]
    return [*placements, *slots]


def count_parameters(placements: Sequence[Placement]) -> int:
    """Return the number of the model's parameters, LoRA kernels included."""
    return sum(math.prod(each.weight.shape) for each in placements if each.weight.kind != "optimizer")


def count_trainable(placements: Sequence[Placement]) -> int:
    """Return the number of parameters that have optimizer slots."""
    return sum(math.prod(each.weight.shape) for each in placements if each.weight.kind == "optimizer") // len(SLOTS)


def dry_run(run: Run, preset: str | None) -> str:
    """Return what `load` and `finetune` would put on each device, as text for the person.

    Args:
        run: settings `mesh`, `layout`, `load` and `finetune`, and where the manifest lies.
        preset: a public checkpoint by name; None for the preset that was fetched.

    Raises:
        ParamsError: no public checkpoint of this name.
        StageError: no manifest, a layout that does not fit, or more replication than the layout may have.
    """
    from stages.core import devices, gemmas
    from stages.core.layouts import make_layout, replication_advice

    params = run.params
    name, architecture = (preset, gemmas.architecture(preset)) if preset else fetched(run.paths)
    # Keras needs some JAX to declare weights with; one CPU device, however many the mesh has.
    devices.configure("simulated", 1)
    mesh = MeshShape(tuple(params.mesh.shape))
    layout = make_layout(params.layout, architecture, mesh)
    tuning = {"rank": params.finetune.rank, "alpha": params.finetune.alpha, "targets": params.finetune.targets}
    placements = resolve_shapes(architecture, mesh, layout, params.load.dtype, tuning)
    # The gate of the load stage: over the weights that it loads.
    base = [each for each in placements if each.weight.kind == "weight"]
    advice = replication_advice(params.layout, architecture, base, mesh)
    check_replication(base, mesh, params.layout.max_replicated_fraction, advice)
    return "\n".join([f"{name}, {params.load.dtype}", summary(placements, mesh, layout, tuning)])


def fetched(paths: Paths) -> tuple[str, Architecture]:
    """Return name and architecture of the preset that was fetched; its weights are not read, not even to check them.

    Raises:
        StageError: no manifest, no or an altered configuration, or not a text Gemma.
    """
    from stages.core.paths import MANIFEST
    from stages.core.presets import read_manifest, verified_folder

    manifest = read_manifest(paths.read(MANIFEST))
    # A GGUF file holds its configuration within, and is not hashed for it.
    small = [file.name for file in manifest.files if file.name == "config.json"]
    folder = verified_folder(manifest, paths.root, only=small)
    return manifest.preset, read_architecture(folder, manifest.format)


def summary(placements: Sequence[Placement], mesh: MeshShape, layout: NamedLayout, tuning: dict[str, Any]) -> str:
    """Return the tutorial's table of a block and the sums: parameters, bytes a device, replication, fallbacks."""
    from stages.core.sharding import block_table

    held = {kind: 0 for kind in ("weight", "lora", "optimizer")}
    for each in placements:
        held[each.weight.kind] += each.bytes_per_device
    weights = [each for each in placements if each.weight.kind != "optimizer"]
    method = f"LoRA rank {tuning['rank']} on {', '.join(tuning['targets'])}" if tuning["rank"] else "every weight"
    lines = [
        block_table(placements),
        "",
        f"Mesh: {mesh}, {mesh.devices} devices. Layout: {layout.name}.",
        f"Parameters: {count_parameters(placements):,}. Trainable ({method}): {count_trainable(placements):,}.",
        f"Bytes a device: {sum(held.values()):,} (weights {held['weight']:,}, LoRA {held['lora']:,}, "
        f"optimizer {held['optimizer']:,}).",
        f"Replicated fraction of the weights' bytes: {replicated_fraction(weights, mesh):.6f}.",
    ]
    lines += [f"Fallback: {each}" for each in layout.fallbacks]
    return "\n".join(lines)
