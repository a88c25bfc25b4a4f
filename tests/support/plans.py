"""What tests of plan share: requests on tiny presets, and made-up results."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.core.config.reader import read_params
from stages.core.plan.chips import CHIPS
from stages.core.plan.compilation import CompileRequest, StepCost
from stages.core.plan.step_program import StepRequest
from stages.core.plan.targets import Settings
from stages.core.plan.topology import Topology
from stages.core.sharding.mesh import MeshShape
from stages.core.sharding.named_layouts import make_layout
from tests.support.repository import ROOT
from tests.support.tiny_models import AUTO, open_tiny
from tests.support.tiny_runs import settings

has_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not made for this system")


has_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None,
    reason="XLA's compiler for GPUs is not installed (requirements-gpu-plan.txt)",
)


def described(name: str, count: int) -> Topology:
    """A topology of chips as the table has them, described by nothing but its name."""
    kind = name.partition(":")[0]
    return Topology(name, (SimpleNamespace(device_kind=kind),) * count, count // chips_in(name), CHIPS[kind])


def chips_in(name: str) -> int:
    return math.prod(int(size) for size in name.partition(":")[2].split("x"))


def request(
    preset: Path, name: str, shape=(2, 4), path="ours", dtype="float32", length=32, **changes
) -> CompileRequest:
    architecture = open_tiny(preset).architecture
    mesh = MeshShape(shape)
    layout = make_layout(AUTO, architecture, mesh)
    return CompileRequest(StepRequest(architecture, mesh, layout, dtype, settings(**changes), length, path), name)


def cost(**known) -> StepCost:
    """A made-up result of a compilation."""
    none = {
        "devices": 8,
        "device_kind": "cpu",
        "chips": 8,
        "parameters": 1,
        "trainable_parameters": 1,
        "memory_bytes": None,
        "by_kind": {},
        "weights": [],
    }
    return StepCost(**{**none, "fits": True, "compile_seconds": 1.0, **known})


def plan_settings():
    params = read_params(ROOT / "params.yaml")
    return Settings(
        params.fetch, params.tokenize, params.mesh, params.layout, params.load, params.finetune, params.plan
    )
