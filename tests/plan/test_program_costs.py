"""What is read out of a compiled program: flops, traffic, collectives, buffers."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding

from stages.core.plan import hlo, program_costs, topology
from tests.support.plans import has_libtpu


def costs(text: str) -> program_costs.ProgramCosts:
    return program_costs.costs(hlo.parse(text))


def test_products_in_a_loop_count_as_often_as_it_runs(devices):
    def five(a, b):
        return jax.lax.fori_loop(0, 5, lambda _, x: x @ b, a)

    compiled = jax.jit(five).lower(np.ones((8, 16), "f4"), np.ones((16, 16), "f4")).compile()
    assert costs(compiled.as_text()).matrix_flops == 5 * 2 * 8 * 16 * 16


def test_collectives_are_counted_with_what_goes_over_the_wire(devices):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("model",))

    def local(x):
        total = jax.lax.psum(x, "model")
        return total, jax.lax.all_gather(x * total, "model")

    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("model"), out_specs=(P(), P("model"))))
    found = costs(step.lower(np.ones((8, 64), "f4")).compile().as_text()).collectives
    assert found["all-reduce"] == program_costs.Collective(1, 256, 2 * 256 * 7 // 8)
    assert found["all-gather"] == program_costs.Collective(1, 8 * 256, 7 * 256)


def test_a_tpus_attention_kernels_count_the_products_that_they_are_known_to_do():
    """Their metadata are JSON of several lines, after which the computation goes on."""
    text = """HloModule m
ENTRY %main (p: s8[1,4,4], q: bf16[2,512,128]) -> bf16[2,512,128] {
  %p = s8[1,4,4]{2,1,0} parameter(0)
  %q = bf16[2,512,128]{2,1,0} parameter(1)
  %a = bf16[2,512,128]{2,1,0} custom-call(%p, %p, %q), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(f)/kernel_product_flops_100/splash_mha_fwd_segmented_residuals/pallas_call"}
  ROOT %b = bf16[2,512,128]{2,1,0} custom-call(%p, %p, %a), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/kernel_product_flops_100/splash_mha_dkv_segmented_no_residuals/pallas_call"}
}
"""
    assert costs(text).matrix_flops == (2 + 4) * 100
    assert costs(text).pass_flops == (2 + 4) * 100
    assert costs(text.replace("bf16", "f32")).pass_flops == 6 * (2 + 4) * 100


def test_a_tpus_products_of_experts_count_the_flops_that_they_are_named_by():
    text = """HloModule m
ENTRY %main (p: bf16[64,16], q: bf16[4,16,8]) -> bf16[64,8] {
  %p = bf16[64,16]{1,0} parameter(0)
  %q = bf16[4,16,8]{2,1,0} parameter(1)
  %t = bf16[4,16,8]{2,1,0} copy(%q), metadata={op_name="jit(f)/ragged_product_flops_300/convert"}
  ROOT %r = bf16[64,8]{1,0} custom-call(%p, %t), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/transpose(jvp(ragged_product_flops_300))/ragged_dot_general/ragged-dot-none"}
}
"""
    assert (costs(text).matrix_flops, costs(text).pass_flops, costs(text).float32_flops) == (300, 300, 0)
    assert costs(text.replace("bf16", "f32")).pass_flops == 6 * 300


GROUPS = {
    "{{0,1,2,3},{4,5,6,7}}": 4,
    "[2,4]<=[8]": 4,
    "mesh['axis_0'=1,'axis_1'=1,'axis_2'=8,'axis_3'=1] {'axis_3','axis_2'}": 8,
    "mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}": 4,
    "mesh['axis_0'=8] {'axis_0':(2)2}": 2,
}


@pytest.mark.parametrize("groups", GROUPS)
def test_a_collectives_group_is_read_in_each_way_the_compilers_write_it(groups):
    text = f"""HloModule m
ENTRY %main (p: f32[64]) -> f32[64] {{
  %p = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    members = GROUPS[groups]
    assert costs(text).collectives["all-reduce"].wire_bytes == 2 * (256 * (members - 1) // members)


def test_a_permutation_names_pairs_and_sends_what_it_is_given():
    text = """HloModule m
ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  ROOT %r = f32[64]{0} collective-permute(%p), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3}}
}
"""
    assert costs(text).collectives["collective-permute"] == program_costs.Collective(1, 256, 256)


def test_a_collective_that_runs_through_several_fusions_counts_once():
    gather = "all-gather(%x), replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="
    fusions = "".join(
        f"""%part.{number} (x: f32[64]) -> f32[128] {{
  %x = f32[64]{{0}} parameter(0)
  ROOT %g = f32[128]{{0}} {gather}"{chain}"}}
}}

"""
        for number, chain in enumerate((0, 0, 1))
    )
    calls = "".join(f"  %f.{number} = f32[128]{{0}} fusion(%p), calls=%part.{number}\n" for number in range(3))
    text = (
        f"HloModule m\n{fusions}ENTRY %main (p: f32[64]) -> f32[64] {{\n  %p = f32[64]{{0}} parameter(0)\n{calls}}}\n"
    )
    assert costs(text).collectives["all-gather"].count == 2


TRAFFIC = {
    "a slice reads its part, into the chip's own memory": (
        "%r = ((f32[64,32]{1,0:T(8,128)}), f32[16,32]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:16]}",
        16 * 32 * 4,
    ),
    "a copy into the chip's own memory is read once": (
        "%r = (f32[64,32]{1,0:T(8,128)S(1)}, f32[64,32]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)",
        64 * 32 * 4,
    ),
    "an addition reads two and writes one": ("%r = f32[64,32]{1,0} add(%p, %p)", 3 * 64 * 32 * 4),
    "a fusion that slices through a bitcast reads the slice": (
        "%r = f32[8,32]{1,0} fusion(%p, %i), kind=kLoop, calls=%inner",
        2 * 8 * 32 * 4,
    ),
    "a fusion that uses a view of all reads all": (
        "%r = f32[64,32]{1,0} fusion(%p), kind=kLoop, calls=%outer",
        2 * 64 * 32 * 4,
    ),
    "a name moves nothing": ("%r = f32[2048]{0} bitcast(%p)", 0),
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_traffic_is_what_goes_to_and_from_the_devices_main_memory(case):
    line, expected = TRAFFIC[case]
    text = f"""HloModule m
%view (v: f32[64,32]) -> f32[64,32] {{
  %v = f32[64,32]{{1,0}} parameter(0)
  ROOT %w = f32[64,32]{{1,0}} bitcast(%v)
}}

%outer (o: f32[64,32]) -> f32[64,32] {{
  %o = f32[64,32]{{1,0}} parameter(0)
  %n = f32[64,32]{{1,0}} fusion(%o), kind=kLoop, calls=%view
  ROOT %e = f32[64,32]{{1,0}} negate(%n)
}}

%inner (a: f32[64,32], b: s32[]) -> f32[8,32] {{
  %a = f32[64,32]{{1,0}} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[64,32]{{1,0}} bitcast(%a)
  %z = s32[] constant(0)
  ROOT %d = f32[8,32]{{1,0}} dynamic-slice(%c, %b, %z), dynamic_slice_sizes={{8,32}}
}}

ENTRY %main (p: f32[64,32]) -> f32[8,32] {{
  %p = f32[64,32]{{1,0:T(8,128)}} parameter(0)
  %i = s32[] constant(3)
  ROOT {line}
}}
"""
    assert costs(text).memory_bytes == expected


@has_libtpu
def test_a_batch_of_products_that_the_tpu_compiler_writes_as_a_convolution_counts_right(devices):
    device = topology.describe("v5e:2x2").devices[0]
    shapes = [
        jax.ShapeDtypeStruct(shape, "float32", sharding=SingleDeviceSharding(device))
        for shape in ((4, 64, 256), (4, 256, 128))
    ]
    compiled = jax.jit(lambda a, b: a @ b).lower(*shapes).compile()
    assert costs(compiled.as_text()).matrix_flops == 4 * 2 * 64 * 256 * 128


@has_libtpu
@pytest.mark.parametrize(
    "dtypes, passes", [(("float32", "float32"), 6), (("bfloat16", "float32"), 3), (("bfloat16", "bfloat16"), 1)]
)
def test_a_float32_product_takes_a_tpu_six_passes(devices, dtypes, passes):
    device = topology.describe("v5e:2x2").devices[0]
    shapes = [jax.ShapeDtypeStruct((256, 256), dtype, sharding=SingleDeviceSharding(device)) for dtype in dtypes]

    def product(a, b):
        return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type="float32")

    found = costs(jax.jit(product).lower(*shapes).compile().as_text())
    assert (found.matrix_flops, found.pass_flops) == (2 * 256**3, passes * 2 * 256**3)


BUFFERS = """HloModule m
ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[1024]{0} parameter(0)
  %a = f32[8,4]{1,0} add(%p, %p), metadata={op_name="step/add"}
  %b = f32[8,4]{1,0} add(%a, %a), metadata={op_name="step/add"}
  %c = bf16[100]{0:S(1)} copy(%b)
  ROOT %d = bf16[32]{0} negate(%c), metadata={op_name="step/neg"}
}
"""


def test_the_largest_buffers_of_a_program_are_told_once_with_their_place():
    assert program_costs.largest_buffers(hlo.parse(BUFFERS), 5) == [
        {"bytes": 128, "shape": "32 bits x 8 x 4", "operator": "step/add"},
        {"bytes": 64, "shape": "16 bits x 32", "operator": "step/neg"},
    ]


def test_a_product_of_a_gpus_library_counts_as_one():
    text = """HloModule m
ENTRY %main (p: f32[64,32]) -> f32[64,16] {
  %p = bf16[64,32]{1,0} parameter(0)
  %q = bf16[32,16]{1,0} parameter(1)
  %c = (f32[64,16]{1,0}, s8[4096]{0}) custom-call(%p, %q), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %r = f32[64,16]{1,0} get-tuple-element(%c), index=0
}
"""  # noqa: E501
    assert costs(text).matrix_flops == 2 * 64 * 32 * 16


def test_what_fits_in_a_gpus_cache_is_no_traffic():
    text = """HloModule m
ENTRY %main (p: f32[64,32]) -> f32[64,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %a = f32[64,32]{1,0} negate(%p)
  ROOT %b = f32[64,32]{1,0} exponential(%a)
}
"""
    size = 64 * 32 * 4
    assert program_costs.costs(hlo.parse(text)).memory_bytes == 4 * size
    assert program_costs.costs(hlo.parse(text, cache_bytes=size)).memory_bytes == size, "arguments come from memory"
