"""GPUs that are not there: what XLA's compiler for them says, and what the user reads where it is missing."""

from __future__ import annotations

import importlib.util
import re

import pytest

from stages.core.common.errors import StageError
from stages.core.plan import compilation, gpus, topology
from stages.core.plan.chips import CHIPS
from stages.core.plan.roofline import lower_bound
from tests.support.plans import described, has_gpu_compiler, request


@has_gpu_compiler
@pytest.mark.parametrize("name", ["h100:8", "t4:1"])
def test_a_step_is_compiled_for_a_gpu_that_is_not_there(presets, name):
    shape = (1, int(name[-1]))
    found = compilation.compile_step(
        request(presets["gemma"], name, shape=shape, dtype="bfloat16", batch_size=2, learning_rate=0.5)
    )
    assert found.fits and found.device_kind == gpus.GPUS[name.partition(":")[0]].name
    assert found.memory_bytes == CHIPS[name.partition(":")[0]].memory_bytes
    assert found.flops > 0 and found.bound.seconds > 0 and found.step_time is None
    assert bool(found.collectives) == (shape[1] > 1)


@has_gpu_compiler
def test_products_of_a_step_are_as_many_for_a_gpu_as_for_a_tpu_or_cpu(presets):
    on_gpu, on_cpu = (
        compilation.compile_step(request(presets["gemma"], name, shape=(1, 1), batch_size=2))
        for name in ("h100:1", "cpu:1")
    )
    assert on_gpu.flops == pytest.approx(on_cpu.flops, rel=0.05)
    assert on_gpu.float32_flops == on_gpu.flops, "a float32 step asks for float32 products"


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("jax_plugins") else find(name, *rest)
    )
    with pytest.raises(StageError, match=re.escape("pip install --no-deps -r requirements-gpu-plan.txt")) as raised:
        topology.describe("a100-80:8")
    assert "topology=a100-80:8" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["h100:16", "t4:0", "l4:2x4"])
def test_gpus_are_those_of_one_host(name):
    with pytest.raises(StageError, match=f"1 to 8, such as .*Received: topology={name}"):
        topology.describe(name)


def test_each_gpu_is_described_in_xlas_words():
    for kind in gpus.GPUS:
        text = gpus.description(kind)
        assert text.count("{") == text.count("}") and f"device_memory_size: {CHIPS[kind].memory_bytes} " in text


def test_a_gpus_float32_products_run_outside_of_its_matrix_units():
    work = {
        "flops": 3e12,
        "float32_flops": 1e12,
        "pass_flops": 8e12,
        "hbm_traffic_bytes": 0,
        "interconnect_bytes": 45e9,
    }
    bound = lower_bound(described("h100:8", 8), work)
    assert bound.compute == pytest.approx(2 / 989.4 + 1 / 67)
    assert (bound.network, bound.bound_by) == (0.1, "network")
