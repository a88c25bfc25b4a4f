"""How activations are sharded over the mesh, by their role."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core.sharding.layout import Placement, axes_of


class Activations:
    """Constrains activations' shardings, as follows from how the weights are split.

    - Between blocks hidden states are split over time, so that norms and residuals are computed once, not on every
      device; `stages.core.model.tensor_parallel` gathers and sums them.
    - Queries, keys and values are held by whole heads, since norms and rotary embeddings need those. Where heads do not
      divide, every device would compute all of the attention; each takes its share of the query positions instead. On
      eight simulated devices the two took the step of Gemma 3 270M from 3.7 to 2.6 s.
    - What enters the output projection is split as its kernel's input is.

    Time is split only where the axis divides it: not for the single tokens of a sampler.

    Attributes:
        mesh: None for one device, where the compiler puts everything.
    """

    def __init__(self, mesh: Mesh | None = None, placements: Sequence[Placement] = ()) -> None:
        """Take the mesh and the placements of the weights."""
        self.mesh = mesh
        specs = {placement.weight.path: placement.used for placement in placements}

        @functools.cache
        def roles(block: int) -> dict[str, tuple[Any, ...]]:
            query, output = (
                specs[f"decoder_block_{block}/attention/{each}/kernel"] for each in ("query", "attention_output")
            )
            key = specs.get(f"decoder_block_{block}/attention/key/kernel")
            found: dict[str, tuple[Any, ...]] = {
                "hidden": ("model", None),
                "query": ("model" if query[0] is None else None, query[0], None),
                "mixed": (None, output[0], output[1]),
            }
            # A block that attends to another's keys has none.
            if key is not None:
                # Heads before tokens, of which there are as many as the axis divides.
                found |= {"key": (None, key[0], None), "cache": (key[0], None, None)}
            return found

        self._roles = roles

    def __call__(self, array: jax.Array, role: str, block: int = 0) -> jax.Array:
        """Return the activation of a role, and of its block if it has one, with its sharding."""
        if self.mesh is None:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, self.spec(array, role, block)))

    def spec(self, array: jax.Array, role: str, block: int = 0) -> P:
        """Return how the activation of a role is split over the mesh, which there must be."""
        if self.mesh is None:
            raise ValueError("without a mesh nothing is split")
        time, *rest = self._roles(block)[role]
        if array.shape[1] % self.mesh.shape["model"]:
            time = None
        # A rule of the user's own may split a weight over the batch axis too, which activations have spent already.
        return P("batch", *(None if "batch" in axes_of(axis) else axis for axis in (time, *rest)))


UNCONSTRAINED = Activations()
"""One device."""
