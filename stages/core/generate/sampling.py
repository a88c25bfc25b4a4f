"""Continuing prompts: one pass over the prompts, then a token at a time with a key/value cache, in one compiled loop.

Purpose: the tutorial's `generate`, for a model whose weights are split over a mesh, and with a random stream for each
prompt, so that changing one prompt leaves the others' text alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from stages.core.model import decoder, tied_table
from stages.core.model.causal_lm import CausalModel


@dataclass(frozen=True)
class SamplerSettings:
    """How the next token is chosen; hashable, since the loop is compiled for it.

    `temperature` 0.0 is greedy; `top_k` None samples from all. Each of `stop_ids` ends a text. `pieces` is
    the size of the vocabulary: rows of the table beyond it stand for no text and are never chosen.
    """

    max_tokens: int
    temperature: float
    top_k: int | None
    stop_ids: tuple[int, ...]
    pieces: int | None = None


class Sampler:
    """Continues prompts with a model, compiled once for prompts of the same shape however often it is called."""

    def __init__(self, model: CausalModel, settings: SamplerSettings) -> None:
        """Compile nothing yet.

        Args:
            model: the model; each call takes the weights that it has then.
            settings: how to choose.
        """
        self._model = model
        self._settings = settings
        self._run = jax.jit(functools.partial(_generate, model, settings))

    def __call__(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """Continue token sequences.

        Args:
            prompts: token ids with BOS first, of any lengths.
            seed: of the sampling; prompt i has the stream (seed, i).

        Returns:
            The new token ids of each prompt, up to and without the first stop token.
        """
        plan = self._model.head_plan
        batch_devices = plan.mesh.shape["batch"] if plan.mesh is not None else 1
        rows = -(-len(prompts) // batch_devices) * batch_devices
        longest = max(len(prompt) for prompt in prompts)
        ids = np.zeros((rows, longest), np.int32)
        lengths = np.ones((rows,), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))
        # Rows beyond the prompts are padding of the batch axis and count as finished.
        live = np.arange(rows) < len(prompts)
        values = [variable.value for variable in self._model.backbone.variables]
        tokens = np.asarray(self._run(values, ids, lengths, live, keys))
        results = []
        stop = self._settings.stop_ids[0]
        for row in range(len(prompts)):
            new = tokens[row].tolist()
            results.append(new[: new.index(stop)] if stop in new else new)
        return results


def generate(
    model: CausalModel, prompts: Sequence[Sequence[int]], settings: SamplerSettings, seed: int
) -> list[list[int]]:
    """Continue token sequences once: `Sampler(model, settings)(prompts, seed)`."""
    return Sampler(model, settings)(prompts, seed)


def _generate(
    model: CausalModel,
    settings: SamplerSettings,
    values: list[jax.Array],
    ids: jax.Array,
    lengths: jax.Array,
    live: jax.Array,
    keys: jax.Array,
) -> jax.Array:
    """Return int32 (rows, max_tokens): the new tokens, then stop tokens, the first for all."""
    backbone, plan, constrain = model.backbone, model.head_plan, model.constrain
    rows, longest = ids.shape
    stop = settings.stop_ids[0]
    with keras.StatelessScope(state_mapping=list(zip(backbone.variables, values, strict=True))):
        table = model.table.value.astype(backbone.token_embedding.compute_dtype)
        vocabulary, table = table.shape[0], tied_table.padded(table, plan)

        def advance(caches: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
            embedded = constrain(tied_table.embed(table, tokens, plan), "hidden")
            return decoder.hidden_states_cached(
                backbone, embedded, positions, caches, constrain=constrain, projections=model.projections
            )

        def choose(hidden: jax.Array, step: jax.Array) -> jax.Array:
            """Pick a token for each row from its hidden state (rows, hidden); whatever stops becomes the first stop."""
            token = pick(hidden, step)
            return jnp.where(jnp.isin(token, jnp.array(settings.stop_ids)), stop, token)

        def pick(hidden: jax.Array, step: jax.Array) -> jax.Array:
            z = tied_table.logits(hidden, table, vocabulary, plan)
            if settings.pieces is not None and settings.pieces < z.shape[-1]:
                z = jnp.where(jnp.arange(z.shape[-1]) < settings.pieces, z, -jnp.inf)
            if settings.temperature == 0.0:
                return jnp.argmax(z, axis=-1).astype(jnp.int32)
            if settings.top_k is not None and settings.top_k < z.shape[-1]:
                least = jax.lax.top_k(z, settings.top_k)[0][:, -1:]
                z = jnp.where(z >= least, z, -jnp.inf)
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
            return jax.vmap(jax.random.categorical)(step_keys, z / settings.temperature).astype(jnp.int32)

        caches = decoder.empty_caches(backbone, rows, longest + settings.max_tokens)
        positions = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), (rows, longest))
        hidden, caches = advance(caches, ids, positions)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        first = jnp.where(live, choose(last, jnp.int32(0)), stop)
        output = jnp.full((rows, settings.max_tokens), stop, jnp.int32).at[:, 0].set(first)

        def unfinished(state: Any) -> jax.Array:
            step, token, _, _ = state
            return (step < settings.max_tokens) & jnp.any(token != stop)

        def body(state: Any) -> Any:
            step, token, caches, output = state
            # A shorter prompt's padding lies in the cache beyond its own position; new tokens overwrite it in turn.
            hidden, caches = advance(caches, token[:, None], (lengths + step - 1)[:, None])
            following = jnp.where(token == stop, stop, choose(hidden[:, 0], step))
            return step + 1, following, caches, output.at[:, step].set(following)

        return jax.lax.while_loop(unfinished, body, (jnp.int32(1), first, caches, output))[3]
