"""A variant (`models/baseline`, `models/tuned`): what it is on disk, and the model it becomes in memory.

Purpose: load, finetune, generate and evaluate open a variant in the same way, from `model.json` alone.
Reads: `models/<variant>/model.json`, the preset's manifest and files, the tuned weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.common.errors import StageError
from stages.core.common.paths import MANIFEST, Paths, variant_folder
from stages.core.common.progress import bytes_bar
from stages.core.files import read_json
from stages.core.load import adapter, lora_kernels, weight_loading
from stages.core.load.backbone import build_backbone
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import format_of
from stages.core.presets.manifest import Manifest, read_manifest, verified_folder
from stages.core.sharding import devices
from stages.core.sharding.layout import NamedLayout, Placement, Rule, as_spec, resolve
from stages.core.sharding.mesh import MeshShape

if TYPE_CHECKING:
    import jax
    import keras


@dataclass(frozen=True)
class Preset:
    """A preset that was checked file by file."""

    manifest: Manifest
    folder: Path
    architecture: Architecture

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and digests of the files: the same for the same preset, wherever it came from."""
        lines = "".join(f"{file.name} {file.sha256}\n" for file in self.manifest.files)
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class LoadedModel:
    """A backbone with its weights on the devices."""

    backbone: keras.Model
    mesh_shape: MeshShape
    mesh: keras.distribution.DeviceMesh
    placements: list[Placement]
    platform: str

    @property
    def jax_mesh(self) -> jax.sharding.Mesh:
        """The JAX mesh behind the Keras one."""
        from stages.core.sharding.mesh import jax_mesh

        return jax_mesh(self.mesh)


def open_preset(paths: Paths) -> Preset:
    """Read the manifest, check every file of the preset, and read its architecture.

    Raises:
        StageError: no manifest, or a file that is missing or altered.
    """
    manifest = read_manifest(paths.read(MANIFEST))
    folder = verified_folder(manifest, paths.root)
    return Preset(manifest, folder, format_of(manifest.format).read_architecture(folder))


def model_description(
    variant: str, preset: Preset, dtype: str, mesh: MeshShape, device_kind: str, layout: NamedLayout
) -> dict[str, Any]:
    """Return the content of a variant's `model.json`, without tuned weights."""
    return {
        "variant": variant,
        "manifest": MANIFEST,
        "preset": preset.manifest.preset,
        "base": preset.fingerprint,
        "dtype": dtype,
        "mesh": {"shape": list(mesh.shape), "axis_names": list(mesh.axis_names), "devices": device_kind},
        "layout": {
            "name": layout.name,
            "rules": [
                {"pattern": rule.pattern, "spec": list(rule.spec), "optional": rule.optional} for rule in layout.rules
            ],
            "fallbacks": [vars(fallback) for fallback in layout.fallbacks],
        },
        "tuned": None,
    }


def read_description(paths: Paths, variant: str) -> dict[str, Any]:
    """Return a variant's `model.json`."""
    return read_json(paths.read(f"{variant_folder(variant)}/model.json"))


def load_variant(paths: Paths, variant: str, preset: Preset, description: dict[str, Any]) -> LoadedModel:
    """Put a variant's weights on the devices, straight from the files into their shards.

    Args:
        paths: where things lie.
        variant: baseline or tuned.
        preset: from `open_preset`.
        description: the variant's `model.json`; for `load` and `finetune` what they are about to write.

    Raises:
        StageError: the preset is another than the variant's, or its tuned weights are damaged.
    """
    if description["base"] != preset.fingerprint:
        raise StageError(
            f"models/{variant} was made from another preset: {description['preset']} ({description['base'][:12]}). "
            f"Received: {preset.manifest.preset} ({preset.fingerprint[:12]}). Run `dvc repro`."
        )
    tuned = description["tuned"]
    trained = None
    if tuned:
        trained = adapter.load(paths.read(f"{variant_folder(variant)}/{tuned['file']}"), description["base"])
    model = declare_model(description, preset.architecture, tuned)
    fill_model(model, preset, trained or {})
    return model


def declare_model(
    description: dict[str, Any], architecture: Architecture, tuning: dict[str, Any] | None
) -> LoadedModel:
    """Set up devices, mesh and distribution, and declare every weight where the layout puts it; nothing is allocated.

    Args:
        description: a `model.json`.
        architecture: the preset's.
        tuning: rank, alpha and targets; None for the base alone.
    """
    mesh_shape = MeshShape(tuple(description["mesh"]["shape"]), tuple(description["mesh"]["axis_names"]))
    platform = devices.configure(description["mesh"]["devices"], mesh_shape.devices)
    backbone = build_backbone(architecture, description["dtype"])
    import keras

    from stages.core.sharding import mesh as meshes

    if tuning:
        lora_kernels.declare(backbone, tuning["rank"], tuning["alpha"], tuning["targets"])
    rules = [Rule(rule["pattern"], as_spec(rule["spec"]), rule["optional"]) for rule in description["layout"]["rules"]]
    placements = resolve(rules, weight_loading.weights_of(backbone), mesh_shape)
    mesh = meshes.device_mesh(mesh_shape)
    keras.distribution.set_distribution(meshes.distribution(mesh, {rule.anchored: rule.spec for rule in rules}))
    return LoadedModel(backbone, mesh_shape, mesh, placements, platform)


def fill_model(model: LoadedModel, preset: Preset, trained: dict[str, Any]) -> None:
    """Give every declared weight its value: from `trained` where it is there, else from the preset's files."""
    memory = weight_loading.ArraySource(trained)
    total = sum(placement.weight.bytes for placement in model.placements)
    with (
        format_of(preset.manifest.format).open_weights(preset.folder, preset.architecture) as files,
        bytes_bar("Loading weights", total) as show,
    ):
        weight_loading.fill(
            model.backbone, model.placements, model.mesh, lambda path: memory if path in trained else files, show
        )


def check_placed(model: LoadedModel) -> None:
    """Compare what the devices really hold with the layout, weight by weight.

    Raises:
        RuntimeError: internal error: actual and planned sharding differ.
    """
    by_path = {placement.weight.path: placement for placement in model.placements}
    for variable in model.backbone.weights:
        held = variable.value.sharding.shard_shape(tuple(variable.shape))
        if held != by_path[variable.path].shard_shape:
            raise RuntimeError(f"{variable.path} is held as {held}, not {by_path[variable.path].shard_shape}")
