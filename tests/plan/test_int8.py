"""The TPU compiler converts int8 codes within the products: no step holds a kernel in 16 or 32 bits."""

from __future__ import annotations

import pytest

from stages.core.plan import hlo, topology
from stages.core.plan.step_program import lower
from tests.support.plans import has_libtpu, request
from tests.support.tiny_presets import write_tiny_preset

# Every kernel has more numbers than anything else but the token table: 8 tokens, 512 logits each.
SIZES = {"hidden_dim": 128, "head_dim": 32, "intermediate_dim": 512, "num_layers": 2}
KERNELS = {4 * 32 * 128, 128 * 256, 2 * 32 * 128}


@pytest.fixture(scope="module")
def wide(presets, tmp_path_factory):
    """A tiny preset whose kernels are large beside its activations."""
    return write_tiny_preset(tmp_path_factory.mktemp("wide") / "preset", "gemma2", **SIZES)


def in_16_bits_or_more(preset, dtype: str, **changes) -> list[str]:
    """What a compiled step holds outside of fused operations, of a kernel's size and more than 8 bits a number."""
    asked = request(preset, "v5e:2x2", (1, 1), dtype=dtype, length=8, batch_size=1, targets=["attention/.*"], **changes)
    program = hlo.parse(lower(asked.step, topology.describe("v5e:2x2").devices).lowered.compile().as_text())
    fused = {
        name
        for computation in program.computations.values()
        for each in computation.instructions.values()
        if each.opcode == "fusion"
        for name in each.called("calls")
    }
    return [
        f"{each.opcode} {each.name}"
        for name, computation in program.computations.items()
        if name not in fused
        for each in computation.instructions.values()
        if any(array.bits > 8 and array.elements in KERNELS for array in each.arrays)
    ]


@has_libtpu
@pytest.mark.parametrize("rematerialize", [False, True])
def test_no_kernel_of_codes_is_held_in_the_compute_dtype(wide, rematerialize):
    assert in_16_bits_or_more(wide, "int8", rematerialize=rematerialize) == []


@has_libtpu
def test_of_codes_of_4_bits_their_values_are_held_but_no_scale_or_offset_is_repeated(wide):
    found = in_16_bits_or_more(wide, "int4")
    assert {each.partition(" ")[0] for each in found} <= {"fusion", "bitcast"}, found


@has_libtpu
def test_of_a_bfloat16_base_this_finds_the_kernels(wide):
    # Two blocks of seven.
    assert len([each for each in in_16_bits_or_more(wide, "bfloat16") if each.startswith("parameter")]) >= 14
