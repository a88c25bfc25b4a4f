"""A variant (`models/baseline`, `models/tuned`): what it is on disk, and the model it becomes in memory.

Purpose: load, finetune, generate and evaluate open a variant in the same way, from `model.json` alone.
Reads: `models/<variant>/model.json`, the preset's manifest and files, the tuned weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras

from stages.core.common.errors import StageError
from stages.core.common.paths import MANIFEST, Paths, variant_folder
from stages.core.common.progress import bytes_bar
from stages.core.load import adapter, lora_kernels, weight_loading
from stages.core.load.backbone import build_backbone
from stages.core.load.chosen_codes import ChosenCodes
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import WeightSource, format_of
from stages.core.presets.manifest import read_manifest, verified_folder
from stages.core.processes.group import current
from stages.core.records.forms import four_bits_of, policy_of
from stages.core.records.layout import LoraConfig, MeshShape, NamedLayout
from stages.core.records.manifest import Manifest
from stages.core.records.model_config import ModelConfig
from stages.core.sharding import devices
from stages.core.sharding import mesh as meshes
from stages.core.sharding.hosts import check_split
from stages.core.sharding.layout import Placement, lay_out


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
    layout: NamedLayout

    @property
    def platform(self) -> str:
        """The platform of the devices: cpu, tpu or gpu."""
        return self.mesh_shape.device_kind

    @property
    def model_axis_bytes(self) -> float:
        """Bytes that a device sends along the model axis in a training step for each token of its row of the mesh.

        A block gathers the hidden states twice and sums parts of them twice, and so do their gradients; embedding and
        head do each once. A ring sends all but a device's own part (https://arxiv.org/abs/2205.05198, section 4.2.2).
        """
        axis = self.mesh_shape.sizes["model"]
        state = self.backbone.hidden_dim * jnp.dtype(self.backbone.dtype_policy.compute_dtype).itemsize
        # What is looked up for each block is summed, and what is projected for each gathered and exchanged, both once:
        # nothing of it is trained with an adapter.
        rows = getattr(self.backbone, "hidden_size_per_layer_input", 0) * self.backbone.num_layers
        of_blocks = (rows + rows / axis + self.backbone.hidden_dim if rows else 0) * state / self.backbone.hidden_dim
        return ((8 * self.backbone.num_layers + 4) * state + of_blocks) * (axis - 1) / axis

    @property
    def jax_mesh(self) -> jax.sharding.Mesh:
        """The JAX mesh behind the Keras one."""
        return meshes.jax_mesh(self.mesh)


def open_preset(paths: Paths) -> Preset:
    """Read the manifest, check every file of the preset, and read its architecture.

    Raises:
        StageError: no manifest, or a file that is missing or altered.
    """
    manifest = read_manifest(paths.read(MANIFEST))
    folder = verified_folder(manifest, paths.root)
    return Preset(manifest, folder, format_of(manifest.format).read_architecture(folder))


def chosen_codes(paths: Paths, base: str, dtype: str) -> ChosenCodes | None:
    """Return the codes that `quantize` chose; None for a `load.dtype` without 4-bit codes.

    Raises:
        StageError: `quantize` has not run, or for another base or dtype.
    """
    return ChosenCodes(paths, base, dtype) if four_bits_of(dtype) else None


def model_config(
    preset: Preset, dtype: str, mesh: MeshShape, layout: NamedLayout, chosen: ChosenCodes | None = None
) -> ModelConfig:
    """Return the baseline's `model.json`."""
    return ModelConfig(
        variant="baseline",
        preset=preset.manifest.preset,
        base=preset.fingerprint,
        dtype=dtype,
        mesh=mesh,
        layout=layout,
        codes=chosen.fingerprint if chosen else None,
    )


def read_config(paths: Paths, variant: str) -> ModelConfig:
    """Return a variant's `model.json`: of several processes the first's, which may be the only one that can read it.

    Raises:
        StageError: it does not exist, or is damaged.
    """
    group = current()
    own = ModelConfig.read(paths, f"{variant_folder(variant)}/model.json").content() if group.first else None
    return ModelConfig.model_validate(group.share(own))


def load_variant(
    paths: Paths, variant: str, preset: Preset, *, trying: bool = False, quantized: bool = True
) -> LoadedModel:
    """Put a variant's weights on the devices, straight from the files into their shards.

    Args:
        paths: of inputs and outputs.
        variant: baseline or tuned.
        preset: from `open_preset`.
        trying: on one device where those of the mesh would be simulated, see `for_trying`.
        quantized: False: the weights as they are before `load.dtype` makes codes of them.

    Raises:
        StageError: the preset is another than the variant's, or a file of the variant is damaged.
    """
    config = for_trying(read_config(paths, variant)) if trying else read_config(paths, variant)
    if config.base != preset.fingerprint:
        raise StageError(
            f"models/{variant} was made from another preset: {config.preset} ({config.base[:12]}). "
            f"Received: {preset.manifest.preset} ({preset.fingerprint[:12]}). Run `dvc repro`."
        )
    if not quantized:
        config = config.model_copy(update={"dtype": policy_of(config.dtype)})
    tuned, trained = config.tuned, {}
    if tuned:
        trained = adapter.load(paths.read(f"{variant_folder(variant)}/{tuned.file}"), config.base)
    model = declare_model(config, preset.architecture, tuned.lora if tuned else None)
    fill_model(model, preset, trained, chosen=codes_of(paths, config))
    return model


def codes_of(paths: Paths, config: ModelConfig) -> ChosenCodes | None:
    """Return the chosen codes that a variant was made with; None for a `load.dtype` without 4-bit codes.

    Raises:
        StageError: `models/quantized` holds other codes.
    """
    chosen = chosen_codes(paths, config.base, config.dtype)
    if chosen and chosen.fingerprint != config.codes:
        raise StageError(
            f"models/{config.variant} must have been made with the codes in models/quantized. Received: other codes. "
            "Run `dvc repro`."
        )
    return chosen


def for_trying(config: ModelConfig) -> ModelConfig:
    """Return where to put a model that is only tried: simulated devices cost time, and it holds no more on one of them.

    The numbers are the same but for rounding: sums are not divided over devices.
    """
    if config.mesh.device_kind == "real" or (config.mesh.device_kind == "auto" and devices.accelerator()):
        return config
    one = dataclasses.replace(config.mesh, shape=(1,) * len(config.mesh.shape), device_kind="simulated")
    return config.model_copy(update={"mesh": one})


def declare_model(config: ModelConfig, architecture: Architecture, lora: LoraConfig | None) -> LoadedModel:
    """Set up devices, mesh and distribution, and declare every weight where the layout puts it; nothing is allocated.

    Args:
        config: a `model.json`.
        architecture: the preset's.
        lora: what is trained; None for the base alone.
    """
    check_split(config.mesh, current().count)
    platform = devices.configure(config.mesh.device_kind, config.mesh.devices)
    backbone = build_backbone(architecture, config.dtype)
    if lora:
        lora_kernels.declare(backbone, lora)
    placements = lay_out(config.layout, weight_loading.weights_of(backbone), config.mesh)
    mesh = meshes.device_mesh(config.mesh)
    rules = {rule.anchored: rule.spec for rule in config.layout.rules}
    keras.distribution.set_distribution(meshes.distribution(mesh, rules))
    return LoadedModel(
        backbone, dataclasses.replace(config.mesh, device_kind=platform), mesh, placements, config.layout
    )


def fill_model(
    model: LoadedModel,
    preset: Preset,
    trained: dict[str, Any],
    adapted: Callable[[WeightSource], WeightSource] = lambda files: files,
    chosen: ChosenCodes | None = None,
) -> None:
    """Give every declared weight its value: from `trained` where it is there, else from the preset's files.

    Args:
        model: declared.
        preset: from `open_preset`.
        trained: arrays by path.
        adapted: returns what the files' weights are read through, such as an adapter that is added to them.
        chosen: from `chosen_codes`.
    """
    memory = weight_loading.ArraySource(trained)
    total = sum(placement.weight.bytes for placement in model.placements)
    with (
        format_of(preset.manifest.format).open_weights(preset.folder, preset.architecture) as files,
        bytes_bar("Loading weights", total) as show,
    ):
        source = adapted(files)
        weight_loading.fill(
            model.backbone,
            model.placements,
            model.mesh,
            lambda path: memory if path in trained else source,
            show,
            chosen,
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
