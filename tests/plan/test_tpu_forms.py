"""What a TPU's step does in another way than the plain computation is in its program, and only where it pays."""

from __future__ import annotations

import re

import pytest

from stages.core.plan import topology
from stages.core.plan.step_program import lower
from tests.support.plans import has_libtpu, request
from tests.support.tiny_presets import write_tiny_preset

pytestmark = pytest.mark.usefixtures("devices")


@pytest.fixture(scope="module")
def program_of(tmp_path_factory):
    """Lowers the step of two blocks with eight heads of 8 over eight chips, with adapters on some layers."""
    sizes = {"num_query_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "num_layers": 2}
    preset = write_tiny_preset(tmp_path_factory.mktemp("heads") / "preset", "gemma2", **sizes)

    def of(**changes) -> str:
        asked = request(preset, "v5e:2x4", (1, 8), dtype="bfloat16", **changes)
        return lower(asked.step, topology.describe("v5e:2x4").devices).lowered.as_text()

    return of


def joined(program: str) -> int:
    """How many kernels are made of those of three layers, with a head of each on a device."""
    return len(re.findall(r"stablehlo.concatenate .* -> tensor<3x\d+x8xbf16>", program))


@has_libtpu
def test_frozen_queries_keys_and_values_share_one_product_on_the_way_back(program_of):
    # Of the second block: nothing before the first one is trained.
    assert joined(program_of(targets=["ffw_.*"])) == 1


@has_libtpu
def test_trained_ones_do_not(program_of):
    assert joined(program_of(rank=0)) == 0
