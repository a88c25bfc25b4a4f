"""What a train step needs on devices that are not there, by compiling it for them.

Purpose: from a request (preset, topology, mesh, layout, settings) to memory, collectives and the least step time; a
program that does not fit is an answer. Results are kept by all that they follow from.
Reads and writes: `<cache folder>/plans/<key>`, JSON with its digest before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.core import code, hlo, sharding
from stages.core.errors import StageError
from stages.core.files import optional, read_kept, write_kept
from stages.core.params import without
from stages.core.paths import cache_folder
from stages.core.roofline import bound
from stages.core.topology import describe, program_cache_off

if TYPE_CHECKING:
    from stages.core.step_program import StepRequest

# What a program follows from beside its request and the code that makes it.
PACKAGES = ("jax", "jaxlib", "libtpu", "keras", "keras-hub")
LARGEST = 5  # buffers told of a program
UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


@dataclass(frozen=True)
class Question:
    """A step for a topology; `blocks` None: all of the model's, else a program of so many."""

    request: StepRequest
    topology: str
    blocks: int | None = None

    def program(self) -> StepRequest:
        """Return the request with the blocks that are asked for."""
        if self.blocks is None:
            return self.request
        architecture = self.request.architecture
        config = {**architecture.config, "num_layers": self.blocks}
        return dataclasses.replace(self.request, architecture=dataclasses.replace(architecture, config=config))

    def with_batch(self, batch: int) -> Question:
        """Return the question for another batch size, in windows."""
        settings = self.request.settings.model_copy(update={"batch_size": batch})
        return dataclasses.replace(self, request=dataclasses.replace(self.request, settings=settings))


def key_of(question: Question) -> str:
    """Return a digest of all that the answer follows from."""
    request = question.program()
    parts = {
        "topology": question.topology,
        "architecture": dataclasses.asdict(request.architecture),
        "mesh": [request.mesh.shape, request.mesh.axis_names],
        "rules": [[rule.pattern, rule.spec] for rule in request.layout.rules],
        "dtype": request.dtype,
        "settings": without(request.settings, "display", "run"),
        "length": request.length,
        "path": request.path,
        "packages": {name: _version(name) for name in PACKAGES},
        "code": code.digests("stages/core/planning.py"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def answer(question: Question, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Compile a step and return what it needs, or what was found when it was compiled before.

    Args:
        question: the step.
        say: shows one line to the person before a compilation.

    Returns:
        Per device, in bytes, flops and seconds: `fits`, `argument_bytes`, `temporary_bytes`, `output_bytes`,
        `aliased_bytes`, `needed_bytes`, `memory_bytes` (the chip's), `by_kind` of the arguments, `flops`, `pass_flops`
        (see `hlo.ProgramCosts`) and `moved_bytes` of the compiled program, `collectives`, `least_seconds`, what limits
        it, and `least` by cause; `compile_seconds`; the weights' table; the `largest` buffers. Where it does not fit:
        `fits` false, `asked_bytes`
        and the `largest` buffers as the compiler lists them or, where it stops before that, of two blocks.

    Raises:
        StageError: the layout does not fit, the topology has too few devices, or the compiler fails for another reason
            than memory.
    """
    file = cache_folder() / "plans" / key_of(question)
    with optional("a kept plan cannot be read", say):
        try:
            if (kept := read_kept(file)) is not None:
                return json.loads(kept)
        except ValueError:
            say(f"Warning: the kept plan {file.name} is damaged; it is made anew.")
    found = _compile(question, say)
    if not found["fits"] and not found["largest"] and question.blocks is None:
        # The compiler gave up before it had buffers to list. All blocks are alike: those of two tell them.
        found["largest"] = answer(dataclasses.replace(question, blocks=2), say)["largest"]
    with optional("the plan is not kept for later", say):
        write_kept(file, json.dumps(found).encode())
    return found


def _compile(question: Question, say: Callable[[str], None]) -> dict[str, Any]:
    from stages.core.step_program import lower

    request = question.program()
    topology = describe(question.topology)
    if len(topology.devices) < request.mesh.devices:
        raise StageError(
            f"The mesh needs {request.mesh.devices} devices and {question.topology} has {len(topology.devices)}. "
            f"Received: mesh={list(request.mesh.shape)}, topology={question.topology}."
        )
    program = lower(request, topology.devices)
    kinds: dict[str, int] = {}
    for each in program.placements:
        kinds[each.weight.kind] = kinds.get(each.weight.kind, 0) + each.bytes_per_device
    found: dict[str, Any] = {
        "devices": request.mesh.devices,
        "parameters": program.parameters,
        "trainable_parameters": program.trainable_parameters,
        "memory_bytes": topology.memory_bytes,
        "by_kind": {**kinds, "batch": program.data_bytes},
        "weights": sharding.rows(program.placements, request.mesh),
    }
    say(f"Compiling for {question.topology}, mesh {request.mesh} ...")
    began = time.perf_counter()
    try:
        with contextlib.nullcontext() if topology.chip is None else program_cache_off():
            compiled = program.lowered.compile()
    except Exception as error:
        # The compiler's errors have one type; what it ran out of stands in the text.
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
            raise StageError(f"The compiler failed: {text.splitlines()[0][:300]}") from error
        return {**found, "fits": False, **_out_of_memory(text), "compile_seconds": _since(began)}
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    costs = hlo.costs(text)
    needed = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    least = bound(topology, costs.pass_flops, costs.memory_bytes, costs.wire_bytes)
    return {
        **found,
        "fits": found["memory_bytes"] is None or needed <= found["memory_bytes"],
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "needed_bytes": needed,
        "flops": costs.matrix_flops,
        "pass_flops": costs.pass_flops,
        "moved_bytes": costs.memory_bytes,
        "wire_bytes": costs.wire_bytes,
        "collectives": {kind: dataclasses.asdict(each) for kind, each in costs.collectives.items()},
        "largest": hlo.largest_buffers(text, LARGEST),
        "least_seconds": least and least.seconds,
        "least_limit": least and least.limit,
        "least": least and dataclasses.asdict(least),
        "compile_seconds": _since(began),
    }


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def _size(text: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)([BKMGT]?)i?B?", text).groups()
    return round(float(number) * UNITS[unit])


def _out_of_memory(text: str) -> dict[str, Any]:
    """Take from the compiler's message what it asked for, what there was, and the largest buffers."""
    asked = re.search(r"Used ([\d.]+[BKMGT]?) of ([\d.]+[BKMGT]?)", text)
    # Where the temporaries alone are too much, the compiler stops earlier, says it so, and lists no buffers.
    asked = asked or re.search(r"\(([\d.]+[BKMGT]?)\) exceeds available HBM \(([\d.]+[BKMGT]?)\)", text)
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
        "asked_bytes": _size(asked[1]) if asked else None,
        "available_bytes": _size(asked[2]) if asked else None,
        "largest": largest[:LARGEST],
    }
