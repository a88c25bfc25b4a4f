"""The model that is trained, measured and prompted: a backbone with Gemma's tied head, as a Keras model.

Purpose: `fit`, `evaluate`, callbacks and progress bars are Keras'; the forward pass and the loss are ours
(`stages.core.decoder`, `stages.core.head`), so that nothing of the size tokens x vocabulary is stored and LoRA costs
what its rank says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core import decoder, head
from stages.core.layout import Placement, axes_of
from stages.core.mesh import jax_mesh


class CausalModel(keras.Model):
    """A backbone with Gemma's tied output head, trained and measured on windows of tokens.

    Inputs are a dictionary of (batch, length) arrays: `token_ids`, `target_ids` and `segment_ids` int32, `weights`
    float32. The loss is the mean over tokens of weight x cross-entropy: Keras' own with
    `reduction="mean_with_sample_weight"`.
    """

    def __init__(
        self,
        backbone: keras.Model,
        plan: head.HeadPlan,
        constrain: decoder.Constrain = decoder.unconstrained,
        rematerialize: bool = False,
    ) -> None:
        """Wrap a loaded backbone; nothing is copied."""
        super().__init__(name="causal_model")
        self.backbone = backbone
        self._plan = plan
        self._constrain = constrain
        self._rematerialize = rematerialize
        self._token_loss = keras.metrics.Mean(name="token_loss")
        self._token_accuracy = keras.metrics.Mean(name="token_accuracy")
        self.built = True

    def call(self, inputs: Mapping[str, jax.Array], training: bool = False) -> dict[str, jax.Array]:
        """Return each token's loss in nats and whether its target was the likeliest word."""
        table = self.backbone.token_embedding._embeddings.value.astype(self.backbone.token_embedding.compute_dtype)
        embedded = self._constrain(head.embed(table, inputs["token_ids"], self._plan), "hidden")
        mask = decoder.causal_mask(inputs["segment_ids"])
        hidden = decoder.hidden_states(
            self.backbone, embedded, mask, constrain=self._constrain, rematerialize=self._rematerialize and training
        )
        loss, correct = head.token_losses(hidden, table, inputs["target_ids"], self._plan)
        return {"loss": loss, "correct": correct}

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> jax.Array:
        """Return the batch's loss."""
        weights = x["weights"]
        return jnp.sum(y_pred["loss"] * weights) / jnp.maximum(jnp.sum(weights), 1e-9)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Return the means since the epoch began (as Keras shows) and this batch's own."""
        weights = x["weights"]
        correct = y_pred["correct"].astype("float32")
        self._token_loss.update_state(y_pred["loss"], weights)
        self._token_accuracy.update_state(correct, weights)
        total = jnp.maximum(jnp.sum(weights), 1e-9)
        return {
            **self.get_metrics_result(),
            "batch_loss": jnp.sum(y_pred["loss"] * weights) / total,
            "batch_accuracy": jnp.sum(correct * weights) / total,
        }

    def get_metrics_result(self) -> dict[str, Any]:
        """Return loss and accuracy over all tokens seen since the last reset."""
        return {"loss": self._token_loss.result(), "accuracy": self._token_accuracy.result()}

    def get_config(self) -> dict[str, Any]:
        """Refuse: the model is a run's, and what is kept of it are the trained weights."""
        raise TypeError("CausalModel is not saved; save the trained weights (stages.core.adapter)")


def make_model(
    backbone: keras.Model,
    mesh: keras.distribution.DeviceMesh,
    placements: list[Placement],
    *,
    rematerialize: bool = False,
) -> CausalModel:
    """Return the model to train or measure, with its head and activations laid out for the mesh."""
    plan = head.HeadPlan(
        soft_cap=backbone.token_embedding.logit_soft_cap,
        mesh=jax_mesh(mesh),
        table_is_trained=backbone.token_embedding.trainable,
    )
    return CausalModel(backbone, plan, activation_layout(mesh, placements), rematerialize)


def activation_layout(mesh: keras.distribution.DeviceMesh, placements: list[Placement]) -> decoder.Constrain:
    """Return where activations go, from how the weights are split.

    Left to itself XLA sometimes gathers a kernel, which is larger than the activation. So each projection's output is
    first held as its kernel is split, and then as the next operation needs it: hidden states whole on every device of
    the model axis; queries, keys and values by whole heads, since norms and rotary embeddings need those.
    """
    specs = {
        re.sub(r".*decoder_block_\d+/", "", placement.weight.path): placement.spec
        for placement in placements
        if placement.weight.path.endswith("/kernel")
    }
    query, key = specs["attention/query/kernel"], specs["attention/key/kernel"]
    output, gating = specs["attention/attention_output/kernel"], specs["ffw_gating/kernel"]
    roles = {
        "hidden": P("batch", None, None),
        "query_projected": P("batch", None, query[0], query[2]),
        "query": P("batch", None, query[0], None),
        "key_projected": P("batch", None, key[0], key[2]),
        "key": P("batch", None, key[0], None),
        "mixed": P("batch", None, output[0], output[1]),
        "ffw": P("batch", None, gating[1]),
    }
    # A rule of the person's own may split weights over the batch axis too, which activations have already spent.
    shardings = {
        role: NamedSharding(
            jax_mesh(mesh), P("batch", *(None if "batch" in axes_of(axis) else axis for axis in spec[1:]))
        )
        for role, spec in roles.items()
    }
    return lambda array, role: jax.lax.with_sharding_constraint(array, shardings[role])


def pin_to_mesh(model: CausalModel, mesh: keras.distribution.DeviceMesh) -> None:
    """Put every variable that Keras left on one device onto the mesh, whole.

    On a mesh of one device Keras takes a plain array for placed and leaves it; the step then returns it placed, and
    would be compiled a second time for that.
    """
    whole = NamedSharding(jax_mesh(mesh), P())
    for variable in [*model.variables, *model.optimizer.variables] if model.optimizer else model.variables:
        if not isinstance(variable.value.sharding, NamedSharding):
            variable._value = jax.device_put(variable.value, whole)
