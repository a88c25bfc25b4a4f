"""Continuing prompts: one pass over them, then a token at a time with a key/value cache, in two compiled programs.

Purpose: the tutorial's `generate`, for a model whose weights are split over a mesh. Prompts, new tokens and rows are
padded to powers of two, so that a handful of programs serves all, and settings of how to choose are no part of them.
Each sample has its own random stream: changing one prompt, or their number, leaves the others' text alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core.generate.choosing import Choice, Drawing, choose
from stages.core.model import decoder, kv_cache, layer_embeddings, tied_table
from stages.core.model.causal_lm import CausalModel
from stages.core.sharding.hosts import whole

# Tokens between two looks at what there is: a part of a second on a CPU, so that text appears as it is written.
CHUNK = 8
# The shortest width of prompts and of what follows them; the number of rows has none.
SHORTEST = 16
# Rows that are continued together: a pass reads all weights once for all of them.
MOST_ROWS = 16
# Ids that end a text: `<eos>` and `<end_of_turn>`; a Gemma 4 in turns has one more. One number of them is one program.
STOPS = 2
GREEDY = Drawing()

# Called with a row's number, its new tokens, and whether they are its last; returns whether the row is to end here.
Listener = Callable[[int, list[int], bool], bool]


@dataclass(frozen=True)
class SamplerSettings:
    """How prompts are continued.

    Attributes:
        max_tokens: new tokens of a row at most.
        stop_ids: each ends a text; more than `STOPS` are another program.
        drawing: how the next token is chosen.
        pieces: size of the vocabulary; rows of the table beyond it have no text and are never chosen. None: all have.
    """

    max_tokens: int
    stop_ids: tuple[int, ...]
    drawing: Drawing = GREEDY
    pieces: int | None = None


class Rows(NamedTuple):
    """What does not change while rows are continued.

    `padding` int32 (rows,), before each prompt; `streams` uint32 (rows, 3), seed, prompt and sample; `stops` int32
    (`STOPS` or more,).
    """

    padding: Any
    streams: Any
    stops: Any
    choice: Choice


class State(NamedTuple):
    """What does: the newest token of each row, which is not in the caches yet, and how many there were before it.

    `place` and `made` int32 (): tokens of a row before the newest, with the padding, and new ones with the newest;
    `token` int32 (rows,), the first stop where a row has ended; `seen` bool (rows, vocabulary), the tokens a row has.
    """

    place: Any
    made: Any
    token: Any
    seen: Any
    caches: Any


class Sampler:
    """Continues prompts with a model; the programs are compiled once for each width of prompts and number of rows."""

    def __init__(self, model: CausalModel) -> None:
        """Compile nothing yet; each call takes the weights that the model has then."""
        self._model = model
        self.begin = jax.jit(functools.partial(_begin, model), static_argnames="capacity")
        self.go_on = jax.jit(functools.partial(_go_on, model), donate_argnames="state")

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplerSettings,
        seed: int = 0,
        *,
        samples: int = 1,
        listen: Listener | None = None,
        values: Sequence[jax.Array] | None = None,
    ) -> list[list[int]]:
        """Continue token sequences.

        Args:
            prompts: token ids with BOS first, of any lengths.
            settings: how to continue.
            seed: of the sampling; sample j of prompt i has the stream (seed, i, j).
            samples: continuations of each prompt.
            listen: called with new tokens as they come; returns whether the row ends there.
            values: weights other than the model's own, one for each of the backbone's variables.

        Returns:
            The new token ids of each row, up to and without the first stop token. Row i x samples + j is sample j of
            prompt i.
        """
        held = list(values or [variable.value for variable in self._model.backbone.variables])
        numbered = [(prompt, (i, j)) for i, prompt in enumerate(prompts) for j in range(samples)]
        most = max(MOST_ROWS, self._batch_devices)
        found: list[list[int]] = []
        for start in range(0, len(numbered), most):

            def told(row: int, new: list[int], ended: bool, start: int = start) -> bool:
                return listen is not None and listen(start + row, new, ended)

            found += self._continued(held, numbered[start : start + most], settings, seed, told)
        return found

    @property
    def _batch_devices(self) -> int:
        mesh = self._model.head_plan.mesh
        return mesh.shape["batch"] if mesh is not None else 1

    def _continued(
        self,
        values: list[jax.Array],
        numbered: Sequence[tuple[Sequence[int], tuple[int, int]]],
        settings: SamplerSettings,
        seed: int,
        listen: Listener,
    ) -> list[list[int]]:
        """Continue rows together; arguments as for `__call__`."""
        count, most = len(numbered), settings.max_tokens
        stop = settings.stop_ids[0]
        ids, rows, seen = self._arrays(numbered, settings, seed)
        # Rows beyond the prompts fill the batch up and count as finished.
        live = np.arange(len(ids)) < count
        capacity = ids.shape[1] + bucket(most)
        state = self.begin(values, rows, ids, seen, live, capacity=capacity)
        tokens = whole(state.token)[:, None]
        found: list[list[int]] = [[] for _ in numbered]
        made = 0
        while True:
            made += tokens.shape[1]
            for row in np.flatnonzero(live):
                new = tokens[row].tolist()
                ended = stop in new or made >= most
                new = new[: new.index(stop)] if stop in new else new
                found[row] += new
                live[row] = not (listen(int(row), new, ended) or ended)
            if not live.any():
                return found
            wanted = min(CHUNK, most - made)
            state, tokens = self.go_on(values, rows, state, live, np.int32(wanted))
            tokens = whole(tokens)[:, :wanted]

    def _arrays(
        self, numbered: Sequence[tuple[Sequence[int], tuple[int, int]]], settings: SamplerSettings, seed: int
    ) -> tuple[np.ndarray, Rows, np.ndarray]:
        """Return the prompts int32 (rows, width), each at the end of its row, the `Rows`, and `State.seen`."""
        table = self._model.table
        size = -(-bucket(len(numbered), 1) // self._batch_devices) * self._batch_devices
        width = bucket(max(len(prompt) for prompt, _ in numbered))
        ids = np.zeros((size, width), np.int32)
        padding = np.full((size,), width - 1, np.int32)
        streams = np.zeros((size, 3), np.uint32)
        seen = np.zeros((size, table.shape[0]), bool)
        for row, (prompt, number) in enumerate(numbered):
            padding[row] = width - len(prompt)
            ids[row, padding[row] :] = prompt
            streams[row] = (seed, *number)
            seen[row, list(prompt)] = True
        # The first one fills the places that are left.
        missing = max(0, STOPS - len(settings.stop_ids))
        stops = np.array(settings.stop_ids + settings.stop_ids[:1] * missing, np.int32)
        choice = settings.drawing.as_choice(table.shape[0], settings.pieces)
        return ids, Rows(padding, streams, stops, choice), seen


def bucket(count: int, least: int = SHORTEST) -> int:
    """Return the power of two, at least `least` (one too), that a number of tokens or rows is padded to.

    Example:
        >>> bucket(17), bucket(3, 1)
        (32, 4)
    """
    return max(least, 1 << (count - 1).bit_length())


@contextmanager
def _weights(model: CausalModel, values: list[jax.Array]) -> Iterator[tied_table.Table]:
    """Within the block the model has these weights; gives the table as the head takes it."""
    backbone = model.backbone
    with keras.StatelessScope(state_mapping=list(zip(backbone.variables, values, strict=True))):
        table = tied_table.cast(tied_table.table_of(backbone), backbone.token_embedding.compute_dtype)
        yield tied_table.padded(table, model.head_plan)


def _embedded(model: CausalModel, table: tied_table.Table, ids: jax.Array) -> jax.Array:
    """Return the rows of the table, where the model has its hidden states."""
    rows = tied_table.embed(table, ids, model.head_plan, model.backbone.token_embedding.compute_dtype)
    return model.constrain(rows, "hidden")


def _begin(
    model: CausalModel,
    values: list[jax.Array],
    rows: Rows,
    ids: jax.Array,
    seen: jax.Array,
    live: jax.Array,
    *,
    capacity: int,
) -> State:
    """Read the prompts and return the state with each row's first new token."""
    width = ids.shape[1]
    with _weights(model, values) as table:
        hidden, caches = decoder.read_prompts(
            model.backbone,
            _embedded(model, table, ids),
            width - rows.padding,
            capacity,
            constrain=model.constrain,
            projections=model.projections,
            layer_rows=layer_embeddings.look_up(model.backbone, ids, model.head_plan),
        )
        token = _next(model, rows, table, hidden, seen, jnp.int32(0), live)
        return _laid_out(model, State(jnp.int32(width), jnp.int32(1), token, seen, caches))


def _go_on(
    model: CausalModel, values: list[jax.Array], rows: Rows, state: State, live: jax.Array, count: jax.Array
) -> tuple[State, jax.Array]:
    """Return the state `count` tokens on, or where all live rows have ended, and the new tokens (rows, `CHUNK`)."""
    stop = rows.stops[0]
    state = state._replace(token=jnp.where(live, state.token, stop))
    with _weights(model, values) as table:

        def unfinished(carry: Any) -> jax.Array:
            done, state, _ = carry
            return (done < count) & jnp.any(state.token != stop)

        def body(carry: Any) -> Any:
            done, state, output = carry
            hidden, news = decoder.read_token(
                model.backbone,
                _embedded(model, table, state.token[:, None]),
                state.place,
                rows.padding,
                state.caches,
                constrain=model.constrain,
                projections=model.projections,
                layer_rows=layer_embeddings.look_up(model.backbone, state.token[:, None], model.head_plan),
            )
            seen = state.seen | (jnp.arange(state.seen.shape[1]) == state.token[:, None])
            token = _next(model, rows, table, hidden, seen, state.made, state.token != stop)
            output = jax.lax.dynamic_update_slice(output, token[:, None], (0, done))
            # No token is below 0, which the compiler does not know: by this it sees that the caches are read before
            # they are written, and changes them in place.
            place = state.place + jnp.minimum(jnp.min(token), 0)
            pairs = zip(state.caches, news, strict=True)
            caches = tuple(kv_cache.added(cache, *new, place) for cache, new in pairs)
            return done + 1, State(state.place + 1, state.made + 1, token, seen, caches), output

        output = jnp.full((live.shape[0], CHUNK), stop, jnp.int32)
        _, state, output = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, output))
        return _laid_out(model, state), output


def _next(
    model: CausalModel,
    rows: Rows,
    table: tied_table.Table,
    hidden: jax.Array,
    seen: jax.Array,
    made: jax.Array,
    live: jax.Array,
) -> jax.Array:
    """Return the next token of each row, int32 (rows,); whatever stops becomes the first stop, as in ended rows."""
    z = tied_table.logits(hidden, table, seen.shape[1], model.head_plan)

    def key(stream: jax.Array) -> jax.Array:
        return functools.reduce(jax.random.fold_in, (stream[1], stream[2], made), jax.random.key(stream[0]))

    token = choose(z, seen, jax.vmap(key)(rows.streams), rows.choice)
    return jnp.where(live & ~jnp.isin(token, rows.stops), token, rows.stops[0])


def _laid_out(model: CausalModel, state: State) -> State:
    """Return the state split over the mesh in the one way that both programs take it: another would be compiled for."""
    mesh = model.head_plan.mesh
    if mesh is None:
        return state

    def hold(array: jax.Array, *spec: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P(*spec)))

    vocabulary = None if state.seen.shape[1] % mesh.shape["model"] else "model"
    return state._replace(
        place=hold(state.place),
        made=hold(state.made),
        token=hold(state.token, "batch"),
        caches=tuple(
            tuple(model.constrain(each, "cache", block) for each in cache) for block, cache in enumerate(state.caches)
        ),
        seen=hold(state.seen, "batch", vocabulary),
    )
