"""What a training step needs on devices that are not there, by compiling it ahead of time.

From a request (preset, topology, mesh, layout, settings) to memory, collectives, and a lower bound and an estimate of
the step time. A program that does not fit is a result too. Results are cached under a key of everything they depend on.
Reads and writes: `<cache folder>/plans/<key>`, JSON after its digest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import re
import time
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from stages.core.common import code
from stages.core.common.errors import StageError
from stages.core.common.paths import cache_folder
from stages.core.config.section import without
from stages.core.files import optional, read_kept, write_kept
from stages.core.plan import hlo, program_costs
from stages.core.plan.roofline import Bound, lower_bound
from stages.core.plan.step_program import StepRequest, lower
from stages.core.plan.step_time import step_time
from stages.core.plan.topology import Topology, describe, program_cache_off
from stages.core.presets.layer_kinds import of_blocks
from stages.core.records.plan import Buffer, Collective, StepTime
from stages.core.records.record import Record
from stages.core.records.sharding import WeightRow
from stages.core.sharding import table

logger = logging.getLogger(__name__)

# Packages that a compiled program depends on, in addition to its request and code.
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "keras", "keras-hub")
LARGEST = 5  # buffers listed per program
UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


@dataclass(frozen=True)
class CompileRequest:
    """A step for a topology; `blocks` None: all of the model's, else a program with only that number of blocks.

    Example:
        >>> request = CompileRequest(step, "v5e:2x4")
        >>> compile_step(request).needed_bytes / 2**30    # GiB per device
        4.7
    """

    step: StepRequest
    topology: str
    blocks: int | None = None

    def program(self) -> StepRequest:
        """Return the step with the number of blocks that is to be compiled."""
        if self.blocks is None:
            return self.step
        architecture = self.step.architecture
        fewer = dataclasses.replace(architecture, config=of_blocks(architecture, self.blocks))
        return dataclasses.replace(self.step, architecture=fewer)

    def with_batch(self, batch: int) -> CompileRequest:
        """Return the request with another batch size, in sequences."""
        settings = self.step.settings.model_copy(update={"batch_size": batch})
        return dataclasses.replace(self, step=dataclasses.replace(self.step, settings=settings))


class StepCost(Record):
    """What a compiled step needs per device, in bytes, flops and seconds.

    Attributes:
        device_kind: what JAX calls a device.
        chips: that the mesh uses.
        memory_bytes: what a device has; None for CPU devices.
        by_kind: bytes of the arguments: weight, lora, optimizer, batch.
        weights: the table of `sharding.rows`.
        needed_bytes: arguments, temporaries, results and code; where it does not fit, what the compiler asked for.
        available_bytes: what the compiler had, where it does not fit.
        pass_flops, float32_flops, hbm_traffic_bytes, interconnect_bytes: see `program_costs.ProgramCosts`.
        largest: where it does not fit and the compiler lists no buffers, those of two blocks.
        bound: lower bound of the step time; None for CPU devices.
        step_time: estimate of it, by what it is spent on; None where the compiler has none.
    """

    devices: int
    device_kind: str
    chips: int
    parameters: int
    trainable_parameters: int
    memory_bytes: int | None
    by_kind: dict[str, int]
    weights: list[WeightRow]
    fits: bool
    compile_seconds: float
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    output_bytes: int | None = None
    aliased_bytes: int | None = None
    code_bytes: int | None = None
    needed_bytes: int | None = None
    available_bytes: int | None = None
    flops: int | None = None
    pass_flops: int | None = None
    float32_flops: int | None = None
    hbm_traffic_bytes: int | None = None
    interconnect_bytes: int | None = None
    collectives: dict[str, Collective] = Field(default_factory=dict)
    largest: list[Buffer] = Field(default_factory=list)
    bound: Bound | None = None
    step_time: StepTime | None = None

    @property
    def estimated_seconds(self) -> float | None:
        """The estimated step time, None where there is no estimate; a bound is one for it too."""
        return None if self.step_time is None or self.bound is None else max(self.step_time.seconds, self.bound.seconds)


def key_of(request: CompileRequest) -> str:
    """Return a digest of everything the result depends on."""
    step = request.program()
    parts = {
        "topology": request.topology,
        "architecture": dataclasses.asdict(step.architecture),
        "mesh": [step.mesh.shape, step.mesh.axis_names],
        "rules": [[rule.pattern, rule.spec] for rule in step.layout.rules],
        "shard_over_batch": step.layout.shard_over_batch,
        "dtype": step.dtype,
        "settings": without(step.settings, "display", "run"),
        "length": step.length,
        "path": step.path,
        "packages": {name: _version(name) for name in PACKAGES},
        "code": code.digests("stages/core/plan/compilation.py"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def compile_step(request: CompileRequest) -> StepCost:
    """Compile a step and return what it needs, or return the cached result.

    Args:
        request: the step and the topology.

    Raises:
        StageError: the layout does not fit, the topology has too few devices, or the compiler fails for another reason
            than memory.
    """
    file = cache_folder() / "plans" / key_of(request)
    with optional("a kept plan cannot be read"):
        try:
            if (kept := read_kept(file)) is not None:
                return StepCost.model_validate_json(kept)
        except ValueError:
            logger.warning(f"the kept plan {file.name} is damaged; it is made anew.")
    cost = _compile(request)
    if not cost.fits and not cost.largest and request.blocks is None:
        # The compiler gave up before it had buffers to list. All blocks are alike, so two show them.
        cost = cost.model_copy(update={"largest": compile_step(dataclasses.replace(request, blocks=2)).largest})
    with optional("the plan is not kept for later"):
        write_kept(file, cost.model_dump_json().encode())
    return cost


def _compile(request: CompileRequest) -> StepCost:
    step = request.program()
    topology = describe(request.topology)
    if len(topology.devices) < step.mesh.devices:
        raise StageError(
            f"The mesh needs {step.mesh.devices} devices and {request.topology} has {len(topology.devices)}. "
            f"Received: mesh={list(step.mesh.shape)}, topology={request.topology}."
        )
    program = lower(step, topology.devices)
    kinds: dict[str, int] = {}
    for placement in program.placements:
        kinds[placement.weight.kind] = kinds.get(placement.weight.kind, 0) + placement.bytes_per_device
    known: dict[str, Any] = {
        "devices": step.mesh.devices,
        "device_kind": topology.device_kind,
        "chips": -(-step.mesh.devices // topology.devices_per_chip),
        "parameters": program.parameters,
        "trainable_parameters": program.trainable_parameters,
        "memory_bytes": topology.memory_bytes,
        "by_kind": {**kinds, "batch": program.data_bytes},
        "weights": table.rows(program.placements, step.mesh),
    }
    logger.info(f"Compiling for {request.topology}, mesh {step.mesh} ...")
    began = time.perf_counter()
    try:
        with contextlib.nullcontext() if topology.chip is None else program_cache_off():
            compiled = program.lowered.compile()
    except Exception as error:
        # All errors of the compiler have one type; only the text says that it ran out of memory.
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
            raise StageError(f"The compiler failed: {text.splitlines()[0][:300]}") from error
        return StepCost(**known, fits=False, **_out_of_memory(text), compile_seconds=_since(began))
    return _compiled_cost(compiled, topology, {**known, "compile_seconds": _since(began)})


def _compiled_cost(compiled: Any, topology: Topology, known: dict[str, Any]) -> StepCost:
    """Return what a compiled program needs and does, together with what is already known of it."""
    memory = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text(), topology.chip.cache_bytes if topology.chip else 0)
    costs = program_costs.costs(program)
    work = {
        "flops": costs.matrix_flops,
        "pass_flops": costs.pass_flops,
        "float32_flops": costs.float32_flops,
        "hbm_traffic_bytes": costs.memory_bytes,
        "interconnect_bytes": costs.wire_bytes,
    }
    needed = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return StepCost(
        **known,
        fits=topology.memory_bytes is None or needed <= topology.memory_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        needed_bytes=needed,
        **work,
        collectives={kind: dataclasses.asdict(cost) for kind, cost in costs.collectives.items()},
        largest=program_costs.largest_buffers(program, LARGEST),
        bound=lower_bound(topology, work),
        step_time=step_time(program, topology),
    )


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def _size(text: str) -> int:
    """Return bytes from text such as `15.75G`."""
    return round(float(text.rstrip("BKMGT")) * UNITS[text[-1:] if text[-1:].isalpha() else ""])


def _out_of_memory(text: str) -> dict[str, Any]:
    """Parse the compiler's message: what it asked for, what there was, and the largest buffers."""
    used = re.search(r"Used ([\d.]+[BKMGT]?) of ([\d.]+[BKMGT]?)", text)
    # Where the temporaries alone are too large, the compiler stops earlier, words it so, and lists no buffers.
    used = used or re.search(r"\(([\d.]+[BKMGT]?)\) exceeds available HBM \(([\d.]+[BKMGT]?)\)", text)
    largest = []
    for block in re.split(r"\n\s*\d+\. Size: ", text)[1:]:
        operator = re.search(r'op_name="([^"]*)"', block)
        shape = re.search(r"Shape: (\S+)", block)
        largest.append(
            {
                "bytes": _size(block.split()[0]),
                "shape": shape[1] if shape else "",
                "operator": operator[1] if operator else "",
            }
        )
    return {
        "needed_bytes": _size(used[1]) if used else None,
        "available_bytes": _size(used[2]) if used else None,
        "largest": largest[:LARGEST],
    }
