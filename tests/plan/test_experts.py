"""What the compilers of TPUs and GPUs make of products of experts: no matrix copied, no expert multiplied in vain."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from stages.core.model.sorted_products import ragged
from stages.core.model.tiled_products import TILE, times
from stages.core.plan import hlo, program_costs, topology
from tests.support.plans import has_gpu_compiler, has_libtpu

pytestmark = pytest.mark.usefixtures("devices")

EXPERTS, INPUTS, OUTPUTS, ROWS = 16, 256, 384, 1024
USEFUL = 2 * ROWS * INPUTS * OUTPUTS
MATRICES = EXPERTS * INPUTS * OUTPUTS
A_GPU = pytest.param("h100:1", marks=has_gpu_compiler)
A_TPU = pytest.param("v6e:2x2", marks=has_libtpu)


def compiled(name: str, dtype, trained: bool = False):
    """A product of experts and its gradients, compiled for one device."""
    whole = jax.sharding.SingleDeviceSharding(topology.describe(name).devices[0])

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def both(x, w, scale, of_row, sizes, gradient):
        y, back = jax.vjp(lambda x, w: ragged(trained, USEFUL, x, w, scale, None, of_row, sizes), x, w)
        return y, back(gradient)[: 2 if trained else 1]

    scale = of(EXPERTS, 1, OUTPUTS, dtype=jnp.float32) if dtype == jnp.int8 else None
    numbers = of(ROWS, dtype=jnp.int32), of(EXPERTS, dtype=jnp.int32)
    given = of(ROWS, INPUTS), of(EXPERTS, INPUTS, OUTPUTS, dtype=dtype), scale, *numbers, of(ROWS, OUTPUTS)
    return jax.jit(both).lower(*given).compile()


def of_matrices(program: hlo.Program) -> set[int]:
    """Bits of the arrays outside of fused operations that are as large as the matrices of all experts."""
    return {
        array.bits
        for computation, _, fused in hlo.reached(program)
        if not fused
        for each in computation.instructions.values()
        for array in each.arrays
        if array.elements == MATRICES
    }


@pytest.mark.parametrize("name", [A_TPU, A_GPU])
def test_experts_in_int8_are_never_all_in_16_bits(name):
    assert of_matrices(hlo.parse(compiled(name, jnp.int8).as_text())) == {8}


@has_libtpu
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
def test_a_plan_counts_both_products_of_a_tpus_kernel(dtype):
    """XLA names a kernel anew, without its flops, where it has to turn what the kernel takes."""
    program = hlo.parse(compiled("v6e:2x2", dtype).as_text())
    assert program_costs.costs(program).matrix_flops == 2 * USEFUL


@pytest.mark.parametrize("name", [A_TPU, A_GPU])
def test_no_row_is_multiplied_with_the_experts_it_was_not_sent_to(name):
    """Of masked products there would be sixteen times as many."""
    found = program_costs.costs(hlo.parse(compiled(name, jnp.float32, trained=True).as_text())).matrix_flops
    most = 1 + EXPERTS * TILE / ROWS
    assert 3 * USEFUL <= found <= 3 * most * USEFUL


@has_gpu_compiler
def test_products_of_later_blocks_hold_no_memory_before_they_are_computed():
    """XLA would make the zeros that each product begins with all at once, at the beginning of the step."""
    whole = jax.sharding.SingleDeviceSharding(topology.describe("h100:1").devices[0])
    matrices = jax.ShapeDtypeStruct((EXPERTS, INPUTS, INPUTS), jnp.bfloat16, sharding=whole)

    def temporaries(blocks: int) -> int:
        def chain(x, matrices):
            for w in matrices:
                # As a router decides: how many rows each expert has follows from what the block before returns.
                sizes = jnp.where(x[:EXPERTS, 0] > 0, 2, 1) * (ROWS // EXPERTS // 2)
                x = times(x, w, sizes, None)
            return x

        x = jax.ShapeDtypeStruct((ROWS, INPUTS), jnp.bfloat16, sharding=whole)
        return jax.jit(chain).lower(x, [matrices] * blocks).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(6) - temporaries(2) < 2 * ROWS * INPUTS, "bytes of one block's rows"
