"""Building tiny models for tests: what a variant's `model.json` says, and the model on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import keras
import numpy as np

from stages.core.config.schema import Layout
from stages.core.fetch.local import fetch_local
from stages.core.load import lora_kernels, variants, weight_loading
from stages.core.load.variants import LoadedModel, Preset
from stages.core.presets.formats import format_of
from stages.core.presets.weight_table import weight_table
from stages.core.records.layout import LoraConfig, MeshShape
from stages.core.records.model_config import ModelConfig
from stages.core.sharding.named_layouts import make_layout

AUTO = Layout(name="auto", rules=None, shard_over_batch="none", max_replicated_fraction=1.0)


def open_tiny(folder: Path) -> Preset:
    """A tiny preset folder as `open_preset` would give it."""
    manifest = fetch_local(folder.name, str(folder), folder)
    return Preset(manifest, folder, format_of(manifest.format).read_architecture(folder))


def describe(preset: Preset, shape: tuple[int, int], layout: Layout = AUTO, dtype: str = "float32") -> ModelConfig:
    """The `model.json` of a baseline on a mesh."""
    mesh = MeshShape(shape, device_kind="simulated")
    named = make_layout(layout, preset.architecture, mesh)
    return variants.model_config(preset, dtype, mesh, named)


def load_tiny(
    folder: Path,
    shape: tuple[int, int],
    *,
    rank: int | None = None,
    targets: tuple[str, ...] = ("query", "value"),
    layout: Layout = AUTO,
    dtype: str = "float32",
    random_b: bool = True,
) -> LoadedModel:
    """A tiny model on a mesh; with a rank it has an adapter, whose B is not zero so that it changes the numbers."""
    preset = open_tiny(folder)
    lora = None if rank is None else LoraConfig(rank, 2.0 * rank or None, targets)
    model = variants.declare_model(describe(preset, shape, layout, dtype), preset.architecture, lora)
    adapters = {}
    for weight in weight_loading.weights_of(model.backbone):
        if weight.kind == "lora":
            adapters[weight.path] = lora_kernels.first_value(weight.path, weight.shape, seed=0)
            if random_b and weight.path.endswith("_b"):
                adapters[weight.path] = (
                    np.random.default_rng(len(weight.path)).normal(0, 0.1, weight.shape).astype("f4")
                )
    variants.fill_model(model, preset, adapters)
    return model


def values_of(model: LoadedModel) -> dict[str, np.ndarray]:
    """All weights of a model, by path."""
    return {variable.path: np.asarray(variable.value) for variable in model.backbone.weights}


def same_weights(folder: Path, file_format: str, preset: Path) -> bool:
    """Whether a folder has the weights of a text preset of keras-hub's."""
    architecture = format_of("keras").read_architecture(preset)
    with (
        format_of(file_format).open_weights(folder, format_of(file_format).read_architecture(folder)) as found,
        format_of("keras").open_weights(preset, architecture) as wanted,
    ):
        return all(
            np.array_equal(found.read(path, index), wanted.read(path, index))
            for path, each in weight_table(architecture).items()
            for index in [tuple(slice(0, size) for size in each.shape)]
        )


def float_values(model: LoadedModel) -> dict[str, np.ndarray]:
    """The numbers that a model's weights stand for: codes times their scales, plus their offsets, by plain NumPy."""
    held = values_of(model)

    def of(path: str) -> np.ndarray:
        values, scale, offset = (held.get(f"{path}{end}") for end in ("", "_scale", "_offset"))
        if scale is None:
            return values
        if offset is None:
            return values.astype("f4") * scale
        scale, offset = (np.repeat(each.astype("f4"), 32, axis=-2) for each in (scale, offset))
        return values.astype("f4") * scale + offset

    return {path: of(path) for path in held if path.rpartition("_")[0] not in held}


def sequences(count: int, length: int = 32, vocabulary: int = 512, seed: int = 0) -> dict[str, np.ndarray]:
    """Random sequences with two packed segments each and some weights zero."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(4, vocabulary, (count, length)).astype(np.int32)
    ids[:, 0] = ids[:, length // 2] = 2
    segments = np.repeat([[1] * (length // 2) + [2] * (length - length // 2)], count, axis=0).astype(np.int32)
    weights = np.ones((count, length), np.float32)
    weights[:, -3:] = 0.0
    return {
        "token_ids": ids,
        "target_ids": generator.integers(4, vocabulary, (count, length)).astype(np.int32),
        "segment_ids": segments,
        "weights": weights,
    }


def keras_inputs(backbone: keras.Model, ids: jax.Array) -> dict[str, jax.Array]:
    """What keras-hub's backbone takes for token ids without padding; Gemma 4's takes positions too."""
    ids = jax.numpy.asarray(ids)
    inputs = {"token_ids": ids, "padding_mask": jax.numpy.ones_like(ids)}
    if "position_ids" in backbone.input:
        inputs["position_ids"] = jax.numpy.broadcast_to(jax.numpy.arange(ids.shape[1]), ids.shape)
    return inputs


def keras_hub_reads(folder: Path) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
    """Keras-hub's own model of a preset, loaded by keras-hub: hidden states and logits of token ids, on one device."""
    import keras_hub

    keras.distribution.set_distribution(None)
    backbone = keras_hub.models.Backbone.from_preset(str(folder), dtype="float32")

    @jax.jit
    def read(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = backbone(keras_inputs(backbone, ids))
        return hidden, backbone.token_embedding(hidden, reverse=True)

    return read
