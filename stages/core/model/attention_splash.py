"""Causal attention on a TPU by JAX's own kernel, splash attention: the logits of a block stay in the chip's memory.

Purpose: the one module that knows JAX's Pallas kernels. What they compute is what `attention_blocks` does, held to it
by tests/model/test_attention.py in the kernels' interpreter; what they cannot express (`expresses`), that module does.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stages.core.model.attention_blocks import Scope, list_pairs

# Lanes of a TPU's vector registers, of which blocks and heads are multiples.
LANES = 128
# The largest head for which blocks of 512 tokens were seen to fit into the chip's own memory, in bfloat16.
LARGEST_HEAD = 256


class _Band(splash_attention.Mask):
    """A causal mask, of a window or of all: as JAX's own, but what is asked of a block is worked out from its corners.

    Those compute every element of every block, which takes minutes for 32,768 tokens.
    """

    def __init__(self, length: int, window: int | None) -> None:
        self._length, self._window = length, window
        self.q_sequence = np.arange(length, dtype=np.int32)

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys."""
        return self._length, self._length

    def mask_function(self, queries: Any, keys: Any) -> Any:
        """Return whether each query sees each key, by their places; also of arrays in the kernel."""
        seen = queries >= keys
        return seen if self._window is None else seen & (queries - keys < self._window)

    def __getitem__(self, block: Any) -> np.ndarray:
        """Return bool (1, 2) whose `any()` and `all()` are those of a block's mask."""
        (first, last), (begin, end) = ((each.start, each.stop - 1) for each in block)
        window = self._length if self._window is None else self._window
        some = last >= begin and first - end < window
        return np.array([[some, first >= end and last - begin < window]])


def expresses(scope: Scope, queries: int, head: int, dtype: Any) -> bool:
    """Return whether the kernel can do it: whole registers of tokens and of a head's numbers, which fit.

    Args:
        scope: whose blocks the kernel takes.
        queries: of a device.
        head: the size of one.
        dtype: of the queries.
    """
    fits = head <= LARGEST_HEAD and dtype == jnp.bfloat16
    return fits and head % LANES == 0 and scope.size % LANES == 0 and queries % scope.size == 0


@functools.lru_cache
def kernel(scope: Scope, length: int, heads: int, interpret: bool = False) -> Any:
    """Return the kernel of a sequence, with what it knows of its blocks.

    Args:
        scope: window, soft cap and blocks.
        length: of the sequence.
        heads: of queries that a device has.
        interpret: run it without a TPU, for tests.
    """
    size = scope.size
    # Of one block of keys the gradients of queries need no sum, and come from the kernel that has those of the keys.
    of_queries = () if one_block(scope, length) else (size, size)
    sizes = splash_attention.BlockSizes(*(size,) * 6, *of_queries, use_fused_bwd_kernel=not of_queries)
    mask = splash_attention.MultiHeadMask([_Band(length, scope.window)] * heads)
    # Kept for the next block of the model, so no part of the program that is being traced.
    with jax.ensure_compile_time_eval():
        return splash_attention.make_splash_mha(
            mask,
            block_sizes=sizes,
            attn_logits_soft_cap=scope.soft_cap,
            head_shards=1,
            q_seq_shards=scope.parts,
            interpret=interpret,
        )


def one_block(scope: Scope, length: int) -> bool:
    """Return whether all keys of a sequence are one block, so that one kernel has all gradients."""
    return scope.size == length


def kernel_spec(kernel: Any, mesh: Mesh, axis: str | None) -> Any:
    """Return how a kernel is split over a mesh axis that queries are split over, as `shard_map` takes it."""
    return kernel.manual_sharding_spec(NamedSharding(mesh, P(None, axis)))


def attend(
    kernel: Any, query: jax.Array, key: jax.Array, value: jax.Array, own: jax.Array, others: jax.Array, scope: Scope
) -> jax.Array:
    """Do what `attention_blocks.attend` does, with a kernel made for it; the gradients of keys in their own dtype."""
    heads_first = (each.swapaxes(1, 2) for each in (query, key.astype(query.dtype), value.astype(query.dtype)))
    pairs = max(len(list_pairs(query.shape[1], part, scope)) for part in range(scope.parts))
    flops = 2 * pairs * scope.size**2 * query.shape[0] * query.shape[2] * query.shape[3]
    # Then five products, which the plan takes for the four of the keys' gradients.
    together = one_block(scope, key.shape[1])
    # Its tree cannot be hashed, as that of an argument would be.
    blocks, tree = jax.tree.flatten(kernel)

    def forward(
        blocks: list[jax.Array], own: jax.Array, others: jax.Array, *arrays: jax.Array
    ) -> tuple[jax.Array, Any]:
        sequence = jax.tree.unflatten(tree, blocks)

        def every(*arrays: jax.Array) -> jax.Array:
            return jax.vmap(lambda own, others, *each: sequence(*each, splash_attention.SegmentIds(own, others)))(
                own, others, *arrays
            )

        with _precision(query.dtype), _counted(flops):
            return jax.vjp(every, *arrays)

    def backward(pull_back: Any, gradient: jax.Array) -> tuple[Any, ...]:
        with _precision(query.dtype), _counted(flops * 5 // 4 if together else flops):
            return (None, None, None, *pull_back(gradient))

    # The kernel has a gradient of its own, which JAX would trace later, where the two are not set.
    mix = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    mix.defvjp(forward, backward)
    return mix(blocks, own, others, *heads_first).swapaxes(1, 2)


def _precision(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the precision of the kernel's products: its compiler refuses that of float32 for bfloat16."""
    return contextlib.nullcontext() if dtype == jnp.float32 else jax.default_matmul_precision("default")


def _counted(flops: int) -> contextlib.AbstractContextManager[Any]:
    """Write the flops of one product of queries and keys into the program, where the plan reads them.

    A kernel is opaque to XLA, and JAX's own states no costs (`stages.core.plan.program_costs`).
    """
    return jax.named_scope(f"kernel_product_flops_{flops}")
