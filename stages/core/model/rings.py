"""Products of gathered activations, and sums of products, while the parts travel: collective matrix products.

Purpose: a TPU multiplies while its links send. XLA runs an all-gather before the product that reads it, and a
reduce-scatter after the one that it sums, so the units wait for the links. Here a device multiplies the part that it
has while it sends that part to its neighbours on both sides (Wang et al., 2023,
https://doi.org/10.1145/3567955.3567959); so all links are busy, in both directions.

Everything here is called inside `shard_map`. The products are of frozen weights: these get no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stages.core.model.products import varying_as

AXIS = "model"
# Larger axes are gathered by XLA: each part is a product, and small ones do not keep a TPU's units busy.
MOST_DEVICES = 16
# Tokens in a part, which reads the weights anew: a v5e can multiply each number that it reads 240 times meanwhile.
LEAST_TOKENS = 256
# Numbers in a device's weights. With fewer, products hide little of the way, and what a ring adds to them (sums that
# are no part of the products, writing each part where it belongs) costs more than it saves, by the TPU compiler's
# estimates: docs/training.md.
LEAST_WEIGHTS = 1_500_000
# A linear function of activations (batch, length, ...), given the weights: of one to several, of several to one.
OfOne = Callable[[jax.Array, Any], list[jax.Array]]
OfSeveral = Callable[[list[jax.Array], Any], jax.Array]


@dataclass(frozen=True)
class Ring:
    """A mesh axis as a ring: the numbers of its devices, in an order in which each is a neighbour of the next."""

    order: tuple[int, ...]

    def send(self, array: jax.Array, step: int) -> jax.Array:
        """Return the array of the device before (step 1) or after (step -1) this one."""
        size = len(self.order)
        pairs = [(self.order[place], self.order[(place + step) % size]) for place in range(size)]
        return jax.lax.ppermute(array, AXIS, pairs)

    def device(self, steps: Any) -> jax.Array:
        """Return the number of the device that is some steps after this one."""
        order = np.array(self.order)
        place = jnp.asarray(np.argsort(order))[jax.lax.axis_index(AXIS)]
        return jnp.asarray(order)[(place + steps) % len(self.order)]


def ring_of(devices: Sequence[Any]) -> Ring | None:
    """Return the ring that a TPU's chips form, each wired to the next, or None.

    A row of chips that is no ring has to send its last part back through all of them, which XLA does better.

    Args:
        devices: JAX devices of an axis, real or described.
    """
    if devices[0].platform != "tpu" or not 2 < len(devices) <= MOST_DEVICES:
        return None
    places = [device.coords for device in devices]

    def near(one: int, other: int) -> bool:
        # Two devices of one chip are at one place.
        return sum(abs(a - b) for a, b in zip(places[one], places[other], strict=True)) <= 1

    def completed(path: list[int]) -> list[int] | None:
        if len(path) == len(devices):
            return path if near(path[-1], path[0]) else None
        for one in range(len(devices)):
            if one not in path and near(path[-1], one) and (found := completed([*path, one])):
                return found
        return None

    order = completed([0])
    return Ring(tuple(order)) if order else None


def gathered_products(
    ring: Ring, products: OfOne, x: jax.Array, weights: Any, then: Callable[..., list[jax.Array]] | None = None
) -> list[jax.Array]:
    """Return `products` of an activation gathered over its length, or a function of them.

    Args:
        ring: of the axis.
        products: linear in its first argument; called with parts of the length.
        x: a device's positions (batch, length / devices, ...).
        weights: the second argument of `products`; frozen.
        then: a function, element by element, of what `products` returns. Here the compiler makes it one with the last
            product; after this function it would read and write all results once more.

    Returns:
        Each (batch, length, ...).
    """
    function = then or (lambda *results: list(results))

    def results_of(part: jax.Array, weights: Any) -> list[jax.Array]:
        return function(*products(part, weights))

    @jax.custom_vjp
    def run(x: jax.Array, weights: Any) -> list[jax.Array]:
        return _gathered(ring, results_of, x, weights)

    def forward(x: jax.Array, weights: Any) -> tuple[list[jax.Array], Any]:
        def with_products(part: jax.Array, weights: Any) -> list[jax.Array]:
            found = products(part, weights)
            return [*function(*found), *found]

        found = _gathered(ring, with_products, x, weights)
        count = len(jax.eval_shape(results_of, x, weights))
        return found[:count], (found[count:], weights)

    def back(kept: Any, gradients: list[jax.Array]) -> tuple[jax.Array, None]:
        inputs, weights = kept
        transposed = _transposed(products, x)

        def gradient_of(parts: list[jax.Array], weights: Any) -> jax.Array:
            _, way_back = jax.vjp(function, *parts[len(gradients) :])
            return transposed(list(way_back(parts[: len(gradients)])), weights)

        return _scattered(ring, gradient_of, [*gradients, *inputs], weights), None

    run.defvjp(forward, back)
    return run(x, weights)


def scattered_sum(ring: Ring, product: OfOne, x: jax.Array, weights: Any) -> jax.Array:
    """Return a device's positions of the sum over devices of `product`'s one result.

    Args:
        ring: of the axis.
        product: linear in its first argument; called with parts of the length.
        x: (batch, length, ...).
        weights: the second argument of `product`; frozen.

    Returns:
        (batch, length / devices, ...).
    """

    @jax.custom_vjp
    def run(x: jax.Array, weights: Any) -> jax.Array:
        return _scattered(ring, lambda parts, weights: product(parts[0], weights)[0], [x], weights)

    def back(weights: Any, gradient: jax.Array) -> tuple[jax.Array, None]:
        transposed = _transposed(product, x)
        (found,) = _gathered(ring, lambda part, weights: [transposed([part], weights)], gradient, weights)
        return found, None

    run.defvjp(lambda x, weights: (run(x, weights), weights), back)
    return run(x, weights)


def _gathered(ring: Ring, products: OfOne, x: jax.Array, weights: Any) -> list[jax.Array]:
    if _small(x.shape[0] * x.shape[1], weights):
        return products(jax.lax.all_gather(x, AXIS, axis=1, tiled=True), weights)
    size, length = len(ring.order), x.shape[1]
    shapes = jax.eval_shape(products, x, weights)
    empty = [jax.lax.empty((each.shape[0], size * length, *each.shape[2:]), each.dtype) for each in shapes]
    # Not before the activation is there, or memory for all blocks would be taken at once.
    results, x = jax.lax.optimization_barrier(([_varying(each, x, weights) for each in empty], x))

    def add(part: jax.Array, steps: int) -> None:
        begin = ring.device(steps) * length
        for number, each in enumerate(products(part, weights)):
            results[number] = jax.lax.dynamic_update_slice(results[number], each, (0, begin, *(0,) * (each.ndim - 2)))

    before = after = x
    add(x, 0)
    for steps in range(1, size // 2 + 1):
        before = ring.send(before, 1)
        add(before, -steps)
        if 2 * steps < size:
            after = ring.send(after, -1)
            add(after, steps)
    return results


def _scattered(ring: Ring, product: OfSeveral, parts: list[jax.Array], weights: Any) -> jax.Array:
    size, length = len(ring.order), parts[0].shape[1] // len(ring.order)
    if _small(parts[0].shape[0] * length, weights):
        return jax.lax.psum_scatter(product(parts, weights), AXIS, scatter_dimension=1, tiled=True)

    def own(steps: int) -> jax.Array:
        """Return this device's part of the sum for the device that many places after it."""
        begin = ring.device(steps) * length
        return product([jax.lax.dynamic_slice_in_dim(each, begin, length, 1) for each in parts], weights)

    # The devices before one and those after it sum for it, the farthest first.
    ahead, behind = size // 2, (size - 1) // 2
    for_after, for_before = own(ahead), own(-behind) if behind else None
    for steps in range(1, ahead):
        for_after = ring.send(for_after, 1) + own(ahead - steps)
        if for_before is not None and steps < behind:
            for_before = ring.send(for_before, -1) + own(steps - behind)
    total = ring.send(for_after, 1) + own(0)
    return total if for_before is None else total + ring.send(for_before, -1)


def _transposed(products: OfOne, x: jax.Array) -> OfSeveral:
    """Return the transposed function of `products`, whose argument is as `x` but for its length."""

    def transposed(gradients: list[jax.Array], weights: Any) -> jax.Array:
        like = _varying(jnp.zeros((x.shape[0], gradients[0].shape[1], *x.shape[2:]), x.dtype), gradients, weights)
        _, back = jax.vjp(lambda x: products(x, weights), like)
        return back(gradients)[0]

    return transposed


def _small(tokens: int, weights: Any) -> bool:
    """Whether parts of so many tokens are too small for products of these weights."""
    return tokens < LEAST_TOKENS or sum(each.size for each in jax.tree.leaves(weights)) < LEAST_WEIGHTS


def _varying(array: jax.Array, *others: Any) -> jax.Array:
    """Mark an array as one of each device, over the mesh axes that any of the others is one of each device over."""
    return functools.reduce(varying_as, jax.tree.leaves(others), array)
