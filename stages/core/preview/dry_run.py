"""What `load` and `finetune` would put on each device, as text: `python -m stages.load --dry-run`.

Reads: the manifest and the preset's configuration, or nothing for a public checkpoint by name. No weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.core.cli import Run
from stages.core.common.paths import MANIFEST, Paths
from stages.core.fetch import catalog
from stages.core.plan.shapes import count_parameters, count_trainable, resolve_shapes
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import format_of
from stages.core.presets.manifest import read_manifest, verified_folder
from stages.core.records.layout import LoraConfig, MeshShape, NamedLayout
from stages.core.sharding import devices
from stages.core.sharding.layout import Placement, check_replication, replicated_fraction
from stages.core.sharding.named_layouts import make_layout, replication_advice
from stages.core.sharding.table import block_table, quantized_sizes


def dry_run(run: Run, preset: str | None) -> str:
    """Return what `load` and `finetune` would put on each device, as text for the user.

    Args:
        run: settings `mesh`, `layout`, `load` and `finetune`, and the manifest's path.
        preset: a public checkpoint by name; None for the preset that was fetched.

    Raises:
        ParamsError: no public checkpoint of this name.
        StageError: no manifest, a layout that does not fit, or more replication than the layout may have.
    """
    params = run.params
    name, architecture = (preset, catalog.architecture(preset)) if preset else fetched(run.paths)
    # Keras needs some JAX to declare weights with; one CPU device, however many the mesh has.
    devices.configure("simulated", 1)
    mesh = params.mesh.as_shape()
    layout = make_layout(params.layout, architecture, mesh)
    lora = params.finetune.lora
    placements = resolve_shapes(architecture, mesh, layout, params.load.dtype, lora)
    # The gate of the load stage: over the weights that it loads.
    base = [each for each in placements if each.weight.kind == "weight"]
    advice = replication_advice(params.layout, architecture, base, mesh)
    check_replication(base, mesh, params.layout.max_replicated_fraction, advice)
    return "\n".join([f"{name}, {params.load.dtype}", summary(placements, mesh, layout, lora)])


def fetched(paths: Paths) -> tuple[str, Architecture]:
    """Return name and architecture of the preset that was fetched; its weights are not read, not even to check them.

    Raises:
        StageError: no manifest, no or an altered configuration, or not a text Gemma.
    """
    manifest = read_manifest(paths.read(MANIFEST))
    # A GGUF file holds its configuration within, and is not hashed for it.
    small = [file.name for file in manifest.files if file.name == "config.json"]
    folder = verified_folder(manifest, paths.root, only=small)
    return manifest.preset, format_of(manifest.format).read_architecture(folder)


def summary(placements: Sequence[Placement], mesh: MeshShape, layout: NamedLayout, lora: LoraConfig) -> str:
    """Return the tutorial's table of a block and the sums: parameters, bytes per device, replication, fallbacks."""
    held = {kind: 0 for kind in ("weight", "lora", "optimizer")}
    for each in placements:
        held[each.weight.kind] += each.bytes_per_device
    weights = [each for each in placements if each.weight.kind != "optimizer"]
    method = f"LoRA rank {lora.rank} on {', '.join(lora.targets)}" if lora.rank else "every weight"
    lines = [
        block_table(placements),
        "",
        f"Mesh: {mesh}, {mesh.devices} devices. Layout: {layout.name}{_over_batch(layout)}.",
        f"Parameters: {count_parameters(placements):,}. Trainable ({method}): {count_trainable(placements):,}.",
        f"Bytes per device: {sum(held.values()):,} (weights {held['weight']:,}, LoRA {held['lora']:,}, "
        f"optimizer {held['optimizer']:,}).",
        f"Replicated fraction of the weights' bytes: {replicated_fraction(weights, mesh):.6f}.",
    ]
    lines += [sizes] if (sizes := quantized_sizes(placements)) else []
    lines += [f"Fallback: {each}" for each in layout.fallbacks]
    return "\n".join(lines)


def _over_batch(layout: NamedLayout) -> str:
    """Return what a layout splits over the batch axis too, as the end of a sentence."""
    what = {"optimizer": "optimizer state", "weights": "weights and optimizer state"}
    return f", {what[layout.shard_over_batch]} over the batch axis too" if layout.shard_over_batch != "none" else ""
