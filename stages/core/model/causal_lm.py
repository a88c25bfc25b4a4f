"""The model that is trained, measured and prompted: a backbone with Gemma's tied head, as a Keras model.

Purpose: `fit`, `evaluate`, callbacks and progress bars are Keras'; the forward pass and the loss are ours
(`decoder.py`, `cross_entropy.py`), so that nothing of the size tokens x vocabulary is stored and LoRA costs
what its rank says.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core.common.errors import StageError
from stages.core.model import cross_entropy, decoder, layer_embeddings, tied_table
from stages.core.model.activations import UNCONSTRAINED, Activations
from stages.core.model.experts import busiest_share
from stages.core.model.lora import Dropout
from stages.core.model.tensor_parallel import Projections
from stages.core.sharding.hosts import on_every_process, put
from stages.core.sharding.keras_internals import embedding_table, layer_table, set_value, table_within, update_metrics
from stages.core.sharding.layout import Placement

BUSIEST = "busiest_expert"
"""Of a model with experts, the largest share of a batch's tokens that an expert of any block was sent."""


class CausalModel(keras.Model):
    """A backbone with Gemma's tied output head, trained and measured on sequences of tokens.

    Inputs are a dictionary of (batch, length) arrays: `token_ids`, `target_ids` and `segment_ids` int32, `weights`
    float32. The loss is the mean over tokens of weight x cross-entropy: Keras' own with
    `reduction="mean_with_sample_weight"`. A step may also take (batch, batches, length): its loss and gradients are
    those of one batch of all their sequences, in the memory of one of the batches and one more copy of the gradients.

    Attributes:
        backbone, head_plan, constrain, projections: what the sampler works with too, see `make_model`.
        dropout_step: how many batches were trained on, None without dropout.
    """

    def __init__(
        self,
        backbone: keras.Model,
        plan: tied_table.HeadPlan,
        constrain: Activations = UNCONSTRAINED,
        projections: Projections = decoder.SINGLE,
        rematerialize: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Wrap a loaded backbone; nothing is copied. The arguments are those of `make_model`."""
        super().__init__(name="causal_model")
        self.backbone = backbone
        self.head_plan = plan
        self.constrain = constrain
        self.projections = projections
        self._rematerialize = rematerialize
        self._dropout, self._seed = dropout, seed
        # Dropout depends only on (seed, step, layer), so a resumed run drops the same values.
        self.dropout_step = None
        if dropout:
            self.dropout_step = self.add_weight(
                shape=(), dtype="int32", initializer="zeros", trainable=False, name="dropout_step"
            )
        self._token_loss = keras.metrics.Mean(name="token_loss")
        self._token_accuracy = keras.metrics.Mean(name="token_accuracy")
        # Integers, since float32 does not count beyond 2**24.
        self._token_count = keras.metrics.Sum(name="token_count", dtype="int32")
        self.built = True

    def call(self, inputs: Mapping[str, jax.Array], training: bool = False) -> dict[str, jax.Array]:
        """Return each token's loss in nats and whether its target was the most likely token.

        In training, of a model with experts, also the share of the tokens that the busiest expert was sent.
        """
        embedding = self.backbone.token_embedding
        table = tied_table.table_of(self.backbone)
        embedded = tied_table.embed(table, inputs["token_ids"], self.head_plan, embedding.compute_dtype)
        embedded = self.constrain(embedded, "hidden")
        sent: list[jax.Array] = []
        hidden = decoder.hidden_states(
            self.backbone,
            embedded,
            inputs["segment_ids"],
            constrain=self.constrain,
            projections=self.projections,
            layer_rows=layer_embeddings.look_up(self.backbone, inputs["token_ids"], self.head_plan),
            dropout=self._drop() if training and self.dropout_step is not None else None,
            rematerialize=self._rematerialize and training,
            sent=sent if training else None,
        )
        loss, correct = cross_entropy.token_losses(hidden, table, inputs["target_ids"], self.head_plan)
        found = {"loss": loss, "correct": correct}
        # What Keras' `predict` returns has a row for each sequence.
        return found | ({BUSIEST: busiest_share(sent, inputs["segment_ids"] > 0)} if sent else {})

    @property
    def table(self) -> keras.Variable:
        """The embedding table (vocabulary, hidden), which is the output head too."""
        return embedding_table(self.backbone)

    def _drop(self) -> Dropout:
        """Return this step's dropout, with a random stream for each (seed, step, layer path), and count the step."""
        if self.dropout_step is None:
            raise RuntimeError("a model without dropout has no step to count")
        step = self.dropout_step.value
        self.dropout_step.assign(step + 1)
        of_step = jax.random.fold_in(jax.random.key(self._seed), step)
        kept = 1.0 - self._dropout

        def drop(x: jax.Array, path: str) -> jax.Array:
            mask = jax.random.bernoulli(jax.random.fold_in(of_step, zlib.crc32(path.encode())), kept, x.shape)
            return jnp.where(mask, x / jnp.asarray(kept, x.dtype), jnp.zeros((), x.dtype))

        return drop

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> jax.Array:
        """Return the batch's loss; of a batch of a group, its part of the group's."""
        return jnp.sum(y_pred["loss"] * x["weights"]) / _total(x)

    def train_step(self, state: Any, data: Any) -> tuple[dict[str, jax.Array], Any]:
        """Change the weights once: by Keras' own step, or by the sum of the gradients of a group's batches."""
        if data[0]["weights"].ndim == 2:
            return super().train_step(state, data)
        trainable, rest, optimizer, metrics = state
        batches = jax.tree.map(lambda each: jnp.swapaxes(each, 0, 1), data[0])
        total = _total(batches)
        gradients_of = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)

        def add(carry: Any, batch: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
            gradients, rest, metrics = carry
            batch["total"] = total
            (_, (loss, predicted, rest, metrics)), part = gradients_of(
                trainable, rest, metrics, batch, None, None, training=True, optimizer_variables=optimizer
            )
            logs, metrics = update_metrics(self, metrics, loss, batch, predicted)
            return (jax.tree.map(jnp.add, gradients, part), rest, metrics), logs

        zeros = [jnp.zeros_like(each) for each in trainable]
        (gradients, rest, metrics), logs = jax.lax.scan(add, (zeros, rest, metrics), batches)
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        # The group's own numbers are sums of its batches' parts; the means since the epoch began are the last ones.
        logs = {name: _of_group(name, each) for name, each in logs.items()}
        return logs, (trainable, rest, optimizer, metrics)

    def predict_step(self, state: Any, data: Any) -> tuple[Any, Any]:
        """Return Keras' own outputs, where every process can read them."""
        outputs, rest = super().predict_step(state, data)
        return jax.tree.map(lambda each: on_every_process(each, self.head_plan.mesh), outputs), rest

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Return the means since the epoch began (as Keras shows) and this batch's own, and its tokens."""
        weights = x["weights"]
        correct = y_pred["correct"].astype("float32")
        trained_on = (weights > 0).astype("int32")
        self._token_loss.update_state(y_pred["loss"], weights)
        self._token_accuracy.update_state(correct, weights)
        self._token_count.update_state(trained_on)
        return {
            **self.get_metrics_result(),
            "batch_loss": jnp.sum(y_pred["loss"] * weights) / _total(x),
            "batch_accuracy": jnp.sum(correct * weights) / _total(x),
            "batch_tokens": jnp.sum(trained_on),
            **({BUSIEST: y_pred[BUSIEST]} if BUSIEST in y_pred else {}),
        }

    def measure(self, batches: keras.utils.PyDataset, tokens: int, verbose: int = 0) -> dict[str, float]:
        """Return loss (nats a token) and accuracy over all tokens of some batches, by Keras' `evaluate`.

        Args:
            batches: the sequences to measure on, as `stages.core.tokenize.batches` gives them.
            tokens: how many of their targets have a weight.
            verbose: Keras': 0 silent, 1 a bar, 2 a line.

        Raises:
            StageError: not all of the tokens were measured.
        """
        measured = self.evaluate(batches, return_dict=True, verbose=verbose)
        counted = int(self._token_count.result())
        if counted != tokens:
            raise StageError(
                f"Not all that was given was measured: expected {tokens} tokens. Received: tokens={counted}. "
                "Look for an environment variable or callback that shortens Keras' evaluate."
            )
        return measured

    def token_losses(self, batches: keras.utils.PyDataset, verbose: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss of each token, and whether its target was the most likely token, by Keras' `predict`.

        Args:
            batches: sequences of one length.
            verbose: Keras': 0 silent, 1 a bar, 2 a line.

        Returns:
            float32 (sequences, length) in nats, and bool (sequences, length); each batch with its padding.
        """
        predicted = self.predict(batches, verbose=verbose)
        return predicted["loss"], predicted["correct"]

    def get_metrics_result(self) -> dict[str, Any]:
        """Return loss and accuracy over all tokens seen since the last reset."""
        return {"loss": self._token_loss.result(), "accuracy": self._token_accuracy.result()}

    def reset_metrics(self) -> None:
        """Set the metrics to zero where they are."""
        super().reset_metrics()
        self._place_metrics()

    def make_train_function(self, force: bool = False) -> None:
        """Compile for metrics that are on the mesh."""
        self._place_metrics()
        super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> None:
        """Compile for metrics that are on the mesh."""
        self._place_metrics()
        super().make_test_function(force)

    def _place_metrics(self) -> None:
        """Put the metrics on the mesh, whole: see `pin_to_mesh`."""
        if self.head_plan.mesh is not None:
            _pin(self.metrics_variables, self.head_plan.mesh)

    def get_config(self) -> dict[str, Any]:
        """Refuse: the model is a run's, and what is kept of it are the trained weights."""
        raise TypeError("CausalModel is not saved; save the trained weights (stages.core.load.adapter)")


def _of_group(name: str, values: jax.Array) -> jax.Array:
    """Return a group's number of those of its batches, by its name."""
    if name == BUSIEST:
        return values.max()
    return values.sum() if name.startswith("batch_") else values[-1]


def _total(x: Mapping[str, jax.Array]) -> jax.Array:
    """The weights that a batch's loss is divided by: its group's, where it is one of several."""
    return x["total"] if "total" in x else jnp.maximum(jnp.sum(x["weights"]), 1e-9)


def make_model(
    backbone: keras.Model,
    mesh: jax.sharding.Mesh,
    placements: Sequence[Placement],
    *,
    rematerialize: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> CausalModel:
    """Return the model to train or measure, with its head and activations laid out for the mesh.

    Args:
        backbone: with its adapter if it has one; loaded, or declared only if nothing but its shapes is wanted.
        mesh: the JAX mesh, of real, simulated or described devices.
        placements: of its weights.
        rematerialize: in training keep only each block's input and compute the block again in the backward pass.
        dropout: share of what goes into an adapter that is dropped in training (0.0 to below 1.0).
        seed: of the dropout.
    """
    by_path = {each.weight.path: each for each in placements}

    def gathered_dimension(path: str) -> int | None:
        # Another table than one whose rows the model axis splits is brought into that form by XLA.
        table = by_path[path]
        return table.over_batch if table.used[0] == "model" or mesh.shape["model"] == 1 else None

    of_blocks = layer_table(backbone)
    plan = tied_table.HeadPlan(
        soft_cap=backbone.token_embedding.logit_soft_cap,
        mesh=mesh,
        table_is_trained=backbone.token_embedding.trainable,
        gathered_dimension=gathered_dimension(embedding_table(backbone).path),
        of_blocks=None
        if of_blocks is None
        # Only its rows are converted to the compute dtype, which a trained table's are.
        else tied_table.HeadPlan(
            None,
            mesh,
            table_is_trained=True,
            gathered_dimension=gathered_dimension(table_within(of_blocks).path),
        ),
    )
    projections = Projections(mesh, placements, keep_gathered=rematerialize)
    constrain = Activations(mesh, placements)
    return CausalModel(backbone, plan, constrain, projections, rematerialize, dropout, seed)


def pin_to_mesh(model: CausalModel, mesh: jax.sharding.Mesh) -> None:
    """Put every variable that Keras left on one device onto the mesh, whole.

    On a mesh of one device Keras takes a plain array for placed and leaves it; the step then returns it placed, and
    would be compiled a second time for that.
    """
    _pin([*model.variables, *(model.optimizer.variables if model.optimizer else [])], mesh)


def _pin(variables: list[keras.Variable], mesh: jax.sharding.Mesh) -> None:
    whole = NamedSharding(mesh, P())
    for variable in variables:
        if not isinstance(variable.value.sharding, NamedSharding):
            set_value(variable, put(variable.value, whole))
