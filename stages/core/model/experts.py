"""A block's experts: a router sends each token to a few of many feed-forward networks, and weighs what they return.

Purpose: a token costs the products of the experts that it was sent to. The tokens are sorted by expert, and each
product is one over ragged rows (a kernel of its own on TPUs, tiles on GPUs; on the CPU XLA computes it for every expert
and masks). Source: transformers 5.23, `modeling_gemma4.py` (`Gemma4TextRouter`, `Gemma4TextExperts`):

    r = x / rms(x) * per_dim_scale * D^-0.5,   p = softmax(r Wr) in float32
    weight_e = p_e / (sum of the largest p) * per_expert_scale_e          of the experts with the largest p
    sum over these of weight_e (gelu(y gate_e) * (y up_e)) down_e         the router sees x; y is x, normed

On a mesh either the experts are split over the model axis or each of them inside, over its units. Both ways a device
has all tokens of its row of the mesh, works its part of the experts, and the parts are summed: nothing is exchanged
whose size the router decides, and no token is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from stages.core.model.products import gathered
from stages.core.model.sorted_products import alike, collect, ragged, spread
from stages.core.presets.architecture import EPSILON
from stages.core.presets.layer_kinds import Experts
from stages.core.sharding.keras_internals import kernel_of
from stages.core.sharding.layout import Placement

MATRICES = ("gate_proj", "up_proj", "down_proj")
# Splits of gate_proj and up_proj, and of down_proj, that each device can work by itself.
BY_EXPERT = (("model", None, None), ("model", None, None))
WITHIN = ((None, None, "model"), (None, "model", None))
WHOLE = ((None, None, None), (None, None, None))


class Router(NamedTuple):
    """Its weights: (hidden,), (hidden, experts), and (experts,)."""

    per_dim_scale: jax.Array
    kernel: jax.Array
    per_expert_scale: jax.Array


class Matrix(NamedTuple):
    """One of the matrices of all experts (experts, inputs, outputs); codes have scales, and of 4 bits offsets."""

    values: jax.Array
    scale: jax.Array | None
    offset: jax.Array | None


class Choice(NamedTuple):
    """Of each token the experts that it is sent to, int32 (tokens, chosen), and their weights, float32."""

    experts: jax.Array
    weights: jax.Array


class ExpertBanks:
    """Applies the experts of blocks, each as its weights are split."""

    def __init__(
        self, mesh: Mesh | None = None, placements: Sequence[Placement] = (), *, keep_gathered: bool = False
    ) -> None:
        """Take what `tensor_parallel.Projections` takes."""
        self._mesh = mesh
        self._placed = {placement.weight.path: placement for placement in placements}
        self._again = not keep_gathered

    def __call__(
        self, layer: Any, kind: Experts, x: jax.Array, y: jax.Array, counted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return what a block's experts make of hidden states, and how many tokens each of them was sent.

        Args:
            layer: keras-hub's block.
            kind: of its experts.
            x: (batch, length, hidden), from which the router chooses; split over time or whole.
            y: the same, normed, which the experts take.
            counted: bool (batch, length), the tokens that count as sent.

        Returns:
            (batch, length, hidden) in the compute dtype, split as `x`; and int32 (experts,).
        """
        bank = layer.moe_expert_bank
        router = Router(*(each.value for each in _router(layer)))
        variables = [[getattr(bank, name + end, None) for end in ("", "_scale", "_offset")] for name in MATRICES]
        matrices = [Matrix(*(None if each is None else each.value for each in group)) for group in variables]
        trained = tuple(getattr(bank, name).trainable for name in MATRICES)
        if self._mesh is None:
            choice = route(_rows(x), router, kind.chosen)
            mixed = mix(_rows(y), choice, matrices, trained)
            return mixed.reshape(y.shape), _sent(choice, counted, kind.count)
        held = _Held.of([[None if each is None else self._placed[each.path] for each in group] for group in variables])
        axis = self._mesh.shape["model"]
        time = "model" if axis > 1 and x.shape[1] % axis == 0 else None

        def part(y: jax.Array, choice: Choice, matrices: list[Matrix]) -> jax.Array:
            whole = held.gathered(matrices, y.dtype, trained)
            first = jax.lax.axis_index("model") * whole[0].values.shape[0] if held.split is BY_EXPERT else None
            return mix(y, choice, whole, trained, first, axis if held.split is BY_EXPERT else 1)

        # Else the gathered matrices of all blocks would be kept for the backward pass.
        part = jax.checkpoint(part) if self._again and held.over_batch else part

        def local(
            x: jax.Array, y: jax.Array, counted: jax.Array, router: Router, matrices: list[Matrix]
        ) -> tuple[jax.Array, jax.Array]:
            choice = route(_rows(x), router, kind.chosen)
            sent = jax.lax.psum(_sent(choice, counted, kind.count), ("batch", time) if time else "batch")
            if held.split is WHOLE:
                return part(_rows(y), choice, matrices).reshape(y.shape), sent
            if time:
                pairs = [each.reshape(*x.shape[:2], -1) for each in choice]
                y, *pairs = (jax.lax.all_gather(each, time, axis=1, tiled=True) for each in (y, *pairs))
                choice = Choice(*map(_rows, pairs))
            mixed = part(_rows(y), choice, matrices).reshape(y.shape)
            if time:
                return jax.lax.psum_scatter(mixed, time, scatter_dimension=1, tiled=True), sent
            return jax.lax.psum(mixed, "model"), sent

        of_tokens = P("batch", time, None)
        return jax.shard_map(
            local,
            mesh=self._mesh,
            in_specs=(of_tokens, of_tokens, P("batch", time), Router(P(), P(), P()), held.specs),
            out_specs=(of_tokens, P()),
        )(x, y, counted, router, matrices)


class _Held(NamedTuple):
    """How a block's matrices are split where they are used, their specs where they are kept, and the dimension in which
    each of them (and its scale) is gathered over the batch axis."""

    split: tuple[Any, Any]
    specs: list[Matrix]
    dimensions: list[int | None]

    @classmethod
    def of(cls, placements: Sequence[Sequence[Placement | None]]) -> _Held:
        """Return it of the placements of what each matrix has."""
        gate, up, down = (values.used for values, *_ in placements if values is not None)
        split = next((each for each in (BY_EXPERT, WITHIN, WHOLE) if each == (gate, down) and gate == up), None)
        if split is None:
            # Split in another way: XLA gathers them.
            specs = [Matrix(*(each and P() for each in group)) for group in placements]
            return cls(WHOLE, specs, [None] * len(specs))
        specs = [Matrix(*(each and P(*each.spec) for each in group)) for group in placements]
        return cls(split, specs, [values.over_batch if values else None for values, *_ in placements])

    @property
    def over_batch(self) -> bool:
        """Whether any is to be gathered."""
        return any(each is not None for each in self.dimensions)

    def gathered(self, matrices: Sequence[Matrix], dtype: Any, trained: Sequence[bool]) -> list[Matrix]:
        """Return a device's parts of the matrices, whole over the batch axis.

        A frozen one is sent in a dtype; the gradient of another is summed in its own. Codes are not split so.
        """
        found = []
        for matrix, dimension, trains in zip(matrices, self.dimensions, trained, strict=True):
            if dimension is not None:
                sent = matrix.values.dtype if trains else dtype
                matrix = matrix._replace(values=gathered(matrix.values, dimension, sent))
            found.append(matrix)
        return found


def route(x: jax.Array, router: Router, chosen: int) -> Choice:
    """Return the experts of each token, the likeliest first.

    All of it is in float32, as in transformers: rounded probabilities would choose other experts where two are near.

    Args:
        x: (tokens, hidden), not normed.
        router: its weights.
        chosen: experts of a token.
    """
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)
    x = x * router.per_dim_scale.astype(jnp.float32) * x.shape[-1] ** -0.5
    # On a TPU the default is to round what is multiplied to bfloat16.
    logits = jnp.dot(x, router.kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    likeliest, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), chosen)
    weights = likeliest / jnp.sum(likeliest, axis=-1, keepdims=True)
    return Choice(experts, weights * router.per_expert_scale.astype(jnp.float32)[experts])


def mix(
    y: jax.Array,
    choice: Choice,
    matrices: Sequence[Matrix],
    trained: Sequence[bool],
    first: jax.Array | None = None,
    parts: int = 1,
) -> jax.Array:
    """Return the weighed sum of what each token's experts make of it, as far as they are here.

    Args:
        y: (tokens, hidden), in the compute dtype.
        choice: of each token.
        matrices: gate, up and down, of all experts or of some that follow each other.
        trained: whether each of them has a gradient.
        first: int32 (), the number of the first expert that is here; None: all are.
        parts: over how many devices the experts are divided.

    Returns:
        (tokens, hidden) in the compute dtype.
    """
    gate, up, down = matrices
    count, chosen = gate.values.shape[0], choice.experts.shape[1]
    of_row = choice.experts.reshape(-1)
    if first is not None:
        # The rows of others come last.
        of_row = jnp.where((of_row >= first) & (of_row < first + count), of_row - first, count)
    order = jnp.argsort(of_row)
    back, of_row = jnp.argsort(order), of_row[order]
    sizes = jnp.sum(of_row[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)

    def times(rows: jax.Array, matrix: Matrix, trains: bool) -> jax.Array:
        flops = 2 * rows.shape[0] * matrix.values.shape[1] * matrix.values.shape[2] // parts
        return ragged(trains, flops, *alike(rows, *matrix, of_row, sizes))

    # A product leaves the rows of experts on other devices undefined, and so are their gradients: both are masked out.
    here = None if first is None else (back < jnp.sum(sizes)).reshape(-1, chosen)
    rows = spread(chosen, *alike(y, order, back, here))
    wide = jax.nn.gelu(times(rows, gate, trained[0]), approximate=True) * times(rows, up, trained[1])
    # Weighed here and not after the product: what is kept for the gradient of a weight is as wide as an expert.
    weights = choice.weights if here is None else jnp.where(here, choice.weights, 0.0)
    wide = (wide.astype(jnp.float32) * weights.reshape(-1)[order][:, None]).astype(y.dtype)
    return collect(chosen, *alike(times(wide, down, trained[2]), order, back, here))


def busiest_share(sent: Sequence[jax.Array], counted: jax.Array) -> jax.Array:
    """Return the largest share of the counted tokens that an expert of any block was sent, float32 ()."""
    most = jnp.max(jnp.stack([jnp.max(each) for each in sent]))
    return most.astype(jnp.float32) / jnp.maximum(jnp.sum(counted), 1)


def _router(layer: Any) -> list[Any]:
    """Return the variables of a block's router; the last is kept with the experts."""
    return [layer.moe_router.per_dim_scale, kernel_of(layer.moe_router.proj), layer.moe_expert_bank.per_expert_scale]


def _sent(choice: Choice, counted: jax.Array, experts: int) -> jax.Array:
    """Return how many of the counted tokens were sent to each expert."""
    chosen = (choice.experts[..., None] == jnp.arange(experts)) & counted.reshape(-1)[:, None, None]
    return jnp.sum(chosen, axis=(0, 1), dtype=jnp.int32)


def _rows(x: jax.Array) -> jax.Array:
    """Return (batch, length, n) as (tokens, n)."""
    return x.reshape(-1, x.shape[-1])
