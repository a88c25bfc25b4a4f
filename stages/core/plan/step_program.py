"""The train step as a program for devices that need not exist: lowered from shapes alone, nothing allocated.

Purpose: what `plan` compiles is `CausalModel.train_step` with the optimizer, loss and layout of `stages.finetune`, not
a copy. For comparison the tutorial's own step (keras-hub's layers and LoRA, Keras' loss).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import keras
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core.config.schema import Finetune
from stages.core.finetune.optimizer import make_optimizer, slot_placements
from stages.core.load import lora_kernels, weight_loading
from stages.core.load.backbone import build_backbone
from stages.core.model.causal_lm import make_model
from stages.core.presets.architecture import Architecture
from stages.core.records.layout import MeshShape, NamedLayout
from stages.core.sharding.keras_internals import declared_only, make_metrics
from stages.core.sharding.layout import Placement, lay_out
from stages.core.sharding.mesh import arranged
from stages.core.tokenize.batches import INPUTS, padded_size

# The schedule's end is a number in the program; which one changes neither memory nor time.
STEPS = 1000


@dataclass(frozen=True)
class StepRequest:
    """All that a step's program follows from.

    `path`: `ours` is what finetune runs; `tutorial` keras-hub's causal model compiled and trained as the tutorial does.
    `length` is in tokens per sequence; everything else of the training is in `settings`.
    """

    architecture: Architecture
    mesh: MeshShape
    layout: NamedLayout
    dtype: str
    settings: Finetune
    length: int
    path: str = "ours"


@dataclass(frozen=True)
class StepProgram:
    """A lowered step, and its state's placements."""

    lowered: jax.stages.Lowered
    placements: list[Placement]
    parameters: int
    trainable_parameters: int
    data_bytes: int


def lower(request: StepRequest, devices: Sequence[Any]) -> StepProgram:
    """Trace and lower a train step.

    Args:
        request: the step.
        devices: JAX devices, real or described, at least as many as the mesh has; laid as `mesh.device_mesh` does.

    Raises:
        StageError: the layout does not fit the weights or the mesh.
    """
    mesh = jax.sharding.Mesh(arranged(request.mesh, devices), request.mesh.axis_names)
    build = _tutorial if request.path == "tutorial" else _ours
    model, placements, data = build(request, mesh)
    slots = slot_placements(model.optimizer, placements, request.mesh, request.layout)
    specs = {each.weight.path: each.spec for each in placements}

    def described(variable: keras.Variable, spec: tuple[Any, ...] = ()) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(variable.shape), variable.dtype, sharding=NamedSharding(mesh, P(*spec)))

    state = (
        [described(each, specs.get(each.path, ())) for each in model.trainable_variables],
        [described(each, specs.get(each.path, ())) for each in model.non_trainable_variables],
        [
            described(each, slots[number].spec if number in slots else ())
            for number, each in enumerate(model.optimizer.variables)
        ],
        [described(each) for each in model.metrics_variables],
    )
    shardings = jax.tree.map(lambda each: each.sharding, state)
    # As Keras' own make_train_function does with a distribution set.
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, shardings))
    # The tutorial leaves the precision of float32 products to JAX: on a TPU one bfloat16 pass.
    precise = contextlib.nullcontext() if request.path == "ours" else jax.default_matmul_precision("default")
    with precise:
        lowered = step.lower(state, data)
    share = request.mesh.sizes["batch"]
    return StepProgram(
        lowered,
        [*placements, *slots.values()],
        parameters=sum(each.weight.parameters for each in placements),
        trainable_parameters=sum(int(np.prod(each.shape)) for each in model.trainable_variables),
        data_bytes=sum(each.size * each.dtype.itemsize for each in jax.tree.leaves(data)) // share,
    )


def _ours(request: StepRequest, mesh: jax.sharding.Mesh) -> tuple[keras.Model, list[Placement], Any]:
    settings = request.settings
    backbone = build_backbone(request.architecture, request.dtype)
    lora_kernels.declare(backbone, settings.lora)
    placements = lay_out(request.layout, weight_loading.weights_of(backbone), request.mesh)
    model = make_model(
        backbone,
        mesh,
        placements,
        rematerialize=settings.rematerialize,
        dropout=settings.lora_dropout,
        seed=settings.seed,
    )
    model.compile(optimizer=make_optimizer(settings, STEPS), loss=None, jit_compile=True)
    with declared_only():
        model.optimizer.build(model.trainable_variables)
    types = dict.fromkeys(INPUTS, np.int32) | {"weights": np.float32}
    group = settings.gradient_accumulation
    return model, placements, ({name: _batch(request, mesh, kind, group) for name, kind in types.items()},)


def _tutorial(request: StepRequest, mesh: jax.sharding.Mesh) -> tuple[keras.Model, list[Placement], Any]:
    """Keras-hub's causal model (backbone, then the embedding table in reverse), `enable_lora`, `compile`."""
    settings = request.settings
    backbone = build_backbone(request.architecture, request.dtype)
    with declared_only():
        if settings.rank:
            backbone.enable_lora(settings.rank)
        logits = backbone.token_embedding(backbone.output, reverse=True)
        model = keras.Model(backbone.input, logits)
    placements = lay_out(request.layout, weight_loading.weights_of(backbone), request.mesh)
    ids = _batch(request, mesh, np.int32)
    data = ({"token_ids": ids, "padding_mask": ids}, ids, _batch(request, mesh, np.float32))
    model.compile(
        optimizer=make_optimizer(settings, STEPS),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
        jit_compile=True,
    )
    with declared_only():
        model.optimizer.build(model.trainable_variables)
    make_metrics(model, data)
    return model, placements, data


def _batch(request: StepRequest, mesh: jax.sharding.Mesh, kind: type, group: int = 1) -> jax.ShapeDtypeStruct:
    """A step's array, sharded as `Batches` shards it."""
    rows = padded_size(request.settings.batch_size, request.mesh)
    shape = (rows, request.length) if group == 1 else (rows, group, request.length)
    return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, P("batch")))
