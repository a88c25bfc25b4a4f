"""The next token of each row, from its logits: the likeliest, or one drawn from what the settings leave.

Purpose: all settings are numbers that the compiled program takes, so that changing one compiles nothing. Thresholds are
found by halving the range of all float32 numbers rather than by sorting: 32 passes that any mesh can share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Choice(NamedTuple):
    """How a token is chosen, as scalars; of a few of these `Drawing` says more.

    `top_k` is the vocabulary's size where it is off, `top_p` 1.0, `min_p` 0.0, `repetition_penalty` 1.0; rows of the
    table from `pieces` on have no text and are never chosen.
    """

    temperature: np.float32
    top_k: np.int32
    top_p: np.float32
    min_p: np.float32
    repetition_penalty: np.float32
    pieces: np.int32


@dataclass(frozen=True)
class Drawing:
    """How the next token is chosen, as `params.yaml` says it.

    Attributes:
        temperature: 0.0: the likeliest token, whatever the next three are. Else logits are divided by it.
        top_k: draw from the k likeliest only, and from those as likely as the k-th; None: all.
        top_p: of these, from the likeliest that have this probability together: from each that fewer than `top_p` are
            likelier than; None: all.
        min_p: of these, from those at least this fraction as likely as the likeliest; None: all.
        repetition_penalty: logits of tokens that the row has, prompt included, are divided by it if positive and
            multiplied if negative (https://arxiv.org/abs/1909.05858, section 4.1); 1.0: off.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def as_choice(self, vocabulary: int, pieces: int | None) -> Choice:
        """Return the numbers for a program.

        Args:
            vocabulary: rows of the table.
            pieces: those that have text; None: all.
        """
        return Choice(
            np.float32(self.temperature),
            np.int32(min(self.top_k or vocabulary, vocabulary)),
            np.float32(1.0 if self.top_p is None else self.top_p),
            np.float32(self.min_p or 0.0),
            np.float32(self.repetition_penalty),
            np.int32(min(pieces or vocabulary, vocabulary)),
        )


def choose(z: jax.Array, seen: jax.Array, keys: jax.Array, choice: Choice) -> jax.Array:
    """Return a token for each row, int32 (rows,).

    Args:
        z: logits, float32 (rows, vocabulary).
        seen: bool (rows, vocabulary), the tokens that each row has.
        keys: a random key for each row.
        choice: how to choose.
    """
    z = jnp.where(seen, jnp.where(z > 0, z / choice.repetition_penalty, z * choice.repetition_penalty), z)
    z = jnp.where(jnp.arange(z.shape[-1]) < choice.pieces, z, -jnp.inf)

    def drawn(z: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.categorical)(keys, left(z / choice.temperature, choice))

    chosen = jax.lax.cond(choice.temperature == 0.0, lambda z: jnp.argmax(z, axis=-1), drawn, z)
    return chosen.astype(jnp.int32)


def left(z: jax.Array, choice: Choice) -> jax.Array:
    """Return the logits (rows, vocabulary) of what top-k, top-p and min-p leave, in this order, and -inf for the rest.

    Each is applied to the probabilities of what the one before it left.
    """

    def likeliest(z: jax.Array) -> jax.Array:
        return _above_threshold(z, jnp.ones_like(z), choice.top_k.astype(jnp.float32))

    def nucleus(z: jax.Array) -> jax.Array:
        return _above_threshold(z, jax.nn.softmax(z, axis=-1), choice.top_p)

    z = jax.lax.cond(choice.top_k < z.shape[-1], likeliest, lambda z: z, z)
    z = jax.lax.cond(choice.top_p < 1.0, nucleus, lambda z: z, z)
    least = jnp.max(z, axis=-1, keepdims=True) + jnp.log(choice.min_p)
    return jnp.where(z >= least, z, -jnp.inf)


def _above_threshold(z: jax.Array, weights: jax.Array, limit: jax.Array) -> jax.Array:
    """Return the logits for which all larger ones of their row weigh less than a limit together, and -inf for others.

    Args:
        z: float32 (rows, vocabulary).
        weights: float32 of the same shape, none negative.
        limit: float32 (), above 0.
    """
    # The order of float32 numbers is that of their bits as integers, of negative ones the reverse.
    bits = jax.lax.bitcast_convert_type(z, jnp.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        above = jnp.sum(jnp.where(order > middle, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(above < limit, low, middle + 1), jnp.where(above < limit, middle, high)

    highest = jnp.max(order, axis=-1, keepdims=True)
    lowest = jnp.full_like(highest, jnp.iinfo(jnp.int32).min)
    threshold = jax.lax.fori_loop(0, 32, halve, (lowest, highest))[1]
    return jnp.where(order >= threshold, z, -jnp.inf)
