"""The model's own passes as tests call them: hidden states, loss with gradients, and a token at a time with caches.

Those that return functions compile once; the functions take the weights that the model has when they are called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from stages.core.load.variants import LoadedModel
from stages.core.model import decoder, kv_cache, layer_embeddings, tied_table
from stages.core.model.causal_lm import make_model
from stages.core.model.kv_cache import Cache

Batch = dict[str, np.ndarray]


def loss_and_gradients(model: LoadedModel, batch: Batch, **options: Any) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of the trainable weights, by path, from the model that `fit` trains."""
    return step_of(model, **options)(batch)


def step_of(model: LoadedModel, **options: Any) -> Callable[[Batch], tuple[float, dict[str, np.ndarray]]]:
    """What `loss_and_gradients` does, as a function."""
    causal = make_model(model.backbone, model.jax_mesh, model.placements, **options)
    causal.compile(optimizer=None, loss=None)

    def loss(trainable, rest, batch):
        value, _ = causal.compute_loss_and_updates(
            trainable, rest, [each.value for each in causal.metrics_variables], batch, None, None, training=True
        )
        return value

    compiled = jax.jit(jax.value_and_grad(loss))
    paths = [variable.path for variable in causal.trainable_variables]

    def step(batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        trainable = [variable.value for variable in causal.trainable_variables]
        rest = [variable.value for variable in causal.non_trainable_variables]
        value, gradients = compiled(trainable, rest, batch)
        return float(value), {path: np.asarray(each) for path, each in zip(paths, gradients, strict=True)}

    return step


def hidden_states(model: LoadedModel, batch: Batch) -> np.ndarray:
    """The final hidden states of packed sequences."""
    return forward_of(model)(batch)


def forward_of(model: LoadedModel) -> Callable[[Batch], np.ndarray]:
    """What `hidden_states` does, as a function."""
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    variables = model.backbone.variables

    @jax.jit
    def run(values, batch):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            table = model.backbone.token_embedding._embeddings.value
            return decoder.hidden_states(
                model.backbone,
                tied_table.embed(table, batch["token_ids"], causal.head_plan),
                batch["segment_ids"],
                constrain=causal.constrain,
                layer_rows=layer_embeddings.look_up(model.backbone, batch["token_ids"], causal.head_plan),
            )

    return lambda batch: np.asarray(run([variable.value for variable in variables], batch))


def logits(model: LoadedModel, hidden: np.ndarray) -> np.ndarray:
    """The tied head's logits, (tokens, vocabulary) float32, of hidden states (tokens, hidden)."""
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    plan, table = causal.head_plan, causal.table.value
    padded = tied_table.padded(table, plan)
    return np.asarray(tied_table.logits(jnp.asarray(hidden), padded, table.shape[0], plan))


def decoding_of(
    model: LoadedModel, padding: np.ndarray, width: int
) -> Callable[[np.ndarray], Iterator[tuple[np.ndarray, tuple[Cache, ...]]]]:
    """A function of token ids (rows, length) to each row's newest hidden state and the caches, as tokens come.

    Args:
        model: the model.
        padding: tokens before each row, which are no part of it.
        width: how many are read at once, before the others one by one.
    """
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    variables = model.backbone.variables

    def embedded(ids):
        return tied_table.embed(model.backbone.token_embedding._embeddings.value, ids, causal.head_plan)

    def options(ids):
        rows = layer_embeddings.look_up(model.backbone, ids, causal.head_plan)
        return {"constrain": causal.constrain, "layer_rows": rows}

    @functools.partial(jax.jit, static_argnums=2)
    def begin(values, ids, length):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return decoder.read_prompts(model.backbone, embedded(ids), width - padding, length, **options(ids))

    @jax.jit
    def step(values, ids, place, caches):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            hidden, news = decoder.read_token(model.backbone, embedded(ids), place, padding, caches, **options(ids))
            return hidden, tuple(kv_cache.added(cache, *new, place) for cache, new in zip(caches, news, strict=True))

    def read(rows: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[Cache, ...]]]:
        values = [variable.value for variable in variables]
        hidden, caches = begin(values, rows[:, :width], rows.shape[1])
        yield np.asarray(hidden), caches
        for place in range(width, rows.shape[1]):
            hidden, caches = step(values, rows[:, place : place + 1], np.int32(place), caches)
            yield np.asarray(hidden), caches

    return read
