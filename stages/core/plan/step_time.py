"""The time that a compiled step takes on a TPU: the compiler's own cost model, and what it leaves out, the network.

libtpu writes into the optimized program how many cycles of the core it expects of nearly each fusion and copy
(`estimated_cycles`): the model by which it schedules, vector work and memory traffic included. The program is
scheduled, so its instructions run in their order:

    core: the cycles of each instruction / the core's clock; a loop's body as often as it runs
    links: one collective after the other, each (bytes that a device sends / its links' rate) + hops x latency; but a
    permutation of a ring has one link, and the other way round is free for another
    a collective that is started and awaited later holds the core up only for what is left of it then
    (Thakur et al., 2005, https://doi.org/10.1177/1094342005051521: a ring's time by latency and rate)

    a kernel (model/attention_splash.py, products of model/experts.py), of which the compiler estimates nothing: its
    products at the peak

Not in it: the host's part of a step, congestion between collectives, clocks below the nominal one. How far off that is,
docs/planning.md compares with published measurements.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from stages.core.plan.hlo import Computation, Instruction, Program, trip_count
from stages.core.plan.program_costs import (
    COLLECTIVES,
    collective_bytes,
    group_size,
    kernel_flops,
    multiplies_experts,
    passes,
)
from stages.core.plan.topology import Topology
from stages.core.records.plan import StepTime

# Seconds from a chip to its neighbour: about a microsecond, https://jax-ml.github.io/scaling-book/sharding.
HOP_SECONDS = 1e-6
# What only moves data: a fusion of nothing else is a copy.
MOVING = frozenset(
    [
        "parameter",
        "constant",
        "iota",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "copy",
        "reshape",
        "transpose",
        "broadcast",
        "slice",
        "dynamic-slice",
        "dynamic-update-slice",
        "concatenate",
        "pad",
        "reverse",
        "copy-start",
        "copy-done",
        "slice-start",
        "slice-done",
        "fusion",
    ]
)
# Where in the model an instruction comes from: the innermost frame whose file (and function) is here says it. A None:
# whatever calls it, this is none of these parts.
PLACES: tuple[tuple[str, str, str | None], ...] = (
    # Ours
    (r"model/cross_entropy\.py", "", "head"),
    (r"model/tied_table\.py", "", "head"),
    (r"model/rotary\.py", "", "attention"),
    (r"model/tensor_parallel\.py|model/lora\.py", "", None),
    (r"model/(decoder|layer_embeddings)\.py", "_norm", "norms"),
    (r"model/attention\w*\.py", "", "attention"),
    (r"model/decoder\.py", "_attention", "attention"),
    # Keras' and keras-hub's
    (r"rms_normalization\.py", "", "norms"),
    (r"layers/core/(dense|einsum_dense)\.py", "", None),
    (r"reversible_embedding\.py|losses/|metrics/", "", "head"),
    (r"models/gemma\w*/\w*attention\.py|rotary_embedding\.py", "", "attention"),
)


@dataclass
class _Run:
    """Where a computation is: when core and links are free, in seconds from its begin, and what it was spent on."""

    core: float = 0.0
    # One way round a ring and the other.
    links: list[float] = field(default_factory=lambda: [0.0, 0.0])
    # When what was started is there, by the name of its start or its chain.
    ready: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)

    def spend(self, part: str, seconds: float) -> None:
        """Let the core work for some time."""
        self.core += seconds
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def send(self, seconds: float, ways: Sequence[int] = (0, 1)) -> float:
        """Let the links of some ways work as soon as they are free, and return when they are done."""
        done = max(self.core, *(self.links[way] for way in ways)) + seconds
        for way in ways:
            self.links[way] = done
        return done

    def wait(self, until: float) -> None:
        """Let the core wait for the links."""
        self.spend("network", max(0.0, until - self.core))


def step_time(program: Program, topology: Topology) -> StepTime | None:
    """Return the time of one run of a program on each device.

    Args:
        program: for one device of many (SPMD), compiled for the topology.
        topology: of TPUs; for others the compiler has no estimate, and the result is None.
    """
    if topology.chip is None or not topology.chip.clock:
        return None
    return StepTime(**_Timer(program, topology, topology.chip.clock).seconds(program.entry))


class _Timer:
    """The times of a program's computations, each worked out once."""

    def __init__(self, program: Program, topology: Topology, clock: float) -> None:
        self._program, self._topology, self._clock = program, topology, clock
        self._known: dict[str, dict[str, float]] = {}

    def seconds(self, name: str) -> dict[str, float]:
        """Return what a computation's time is spent on."""
        if name in self._known:
            return self._known[name]
        computation = self._program.computations.get(name)
        run = _Run()
        if computation is not None:
            last = self._last_of_chains(computation)
            for instruction in computation.instructions.values():
                self._step(run, instruction, computation, last)
        self._known[name] = run.parts
        return run.parts

    def _step(self, run: _Run, instruction: Instruction, computation: Computation, last: dict[str, str]) -> None:
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start")
        if opcode == "while":
            rounds = trip_count(instruction, self._program.computations)
            self._inner(run, instruction.called("body"), rounds)
        elif opcode == "conditional":
            self._inner(run, instruction.called("branch_computations")[:1], 1)
        elif opcode == "call":
            self._inner(run, instruction.called("to_apply"), 1)
        elif opcode.endswith("-done"):
            run.wait(max((run.ready.pop(each, 0.0) for each in instruction.operands), default=0.0))
        elif kind in COLLECTIVES or opcode == "async-start":
            self._collectives(run, instruction, computation)
        else:
            self._on_the_core(run, instruction, computation, last)

    def _inner(self, run: _Run, names: list[str], times: int) -> None:
        for name in names:
            for part, seconds in self.seconds(name).items():
                run.spend(part, times * seconds)

    def _collectives(self, run: _Run, instruction: Instruction, computation: Computation) -> None:
        found = [(instruction, computation)]
        if instruction.opcode == "async-start":
            found = [
                (each, computation)
                for name in instruction.called("calls")
                for each, computation in _within(name, self._program)
                if each.opcode in COLLECTIVES
            ]
        for each, where in found:
            done = run.send(*self._transfer(each, where))
            if instruction.opcode.endswith("-start"):
                run.ready[instruction.name] = done
            else:
                run.wait(done)

    def _on_the_core(self, run: _Run, instruction: Instruction, computation: Computation, last: dict[str, str]) -> None:
        """Let the core run a fusion, a copy, or a kernel; collectives inside a fusion run beside it."""
        ends = []
        for each, where in self._inside(instruction):
            if each.opcode.removesuffix("-start") in COLLECTIVES and (chain := _chain(each)):
                if chain not in run.ready:
                    run.ready[chain] = run.send(*self._transfer(each, where))
                ends += [chain] if last.get(chain) == instruction.name else []
        if found := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes):
            run.spend(self._part(instruction), int(found[1]) / self._clock)
        elif (flops := kernel_flops(instruction)) and self._topology.flops:
            part = "products" if multiplies_experts(instruction) else "attention"
            run.spend(part, flops * passes(instruction, computation) / self._topology.flops)
        for chain in ends:
            run.wait(run.ready[chain])

    def _inside(self, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """Yield what a fusion consists of, and where; nothing for another instruction."""
        if instruction.opcode == "fusion":
            for name in instruction.called("calls"):
                yield from _within(name, self._program)

    def _last_of_chains(self, computation: Computation) -> dict[str, str]:
        """Return the last fusion of each collective that runs through several, by its chain."""
        found = {}
        for instruction in computation.instructions.values():
            for each, _ in self._inside(instruction):
                if chain := _chain(each):
                    found[chain] = instruction.name
        return found

    def _transfer(self, instruction: Instruction, computation: Computation) -> tuple[float, Sequence[int]]:
        """Return the seconds that the links need for a collective, and which ways it uses."""
        kind = instruction.opcode.removesuffix("-start")
        _, wire = collective_bytes(instruction, computation, kind)
        if kind == "collective-permute":
            return wire / self._topology.link_rate + HOP_SECONDS if wire else 0.0, (_way(instruction),)
        members = group_size(instruction)
        # A ring that sends both ways is half as long.
        hops = members // 2 * (2 if kind == "all-reduce" else 1)
        return wire / self._topology.ring_rate(members) + hops * HOP_SECONDS if wire else 0.0, (0, 1)

    def _part(self, instruction: Instruction) -> str:
        """Return what an instruction of the core belongs to, a field of `StepTime`."""
        inside = [each for each, _ in self._inside(instruction)]
        products = [each for each in inside or [instruction] if each.opcode in ("dot", "convolution")]
        if products:
            place = self._place(products[-1])
            return place if place in ("attention", "head") else "products"
        if all(each.opcode in MOVING for each in inside or [instruction]):
            return "copies"
        return self._place(instruction) or "other"

    def _place(self, instruction: Instruction) -> str | None:
        """Return the part of the model that an instruction comes from, None for none of them."""
        for file, function in self._program.frames_of(instruction):
            for in_file, in_function, part in PLACES:
                if re.search(f"(?:{in_file})", file) and re.search(f"^(?:{in_function})", function):
                    return part
        return None


def _within(name: str, program: Program) -> Iterator[tuple[Instruction, Computation]]:
    """Yield the instructions of a computation and of the fusions in it, each with the computation that it is in."""
    computation = program.computations.get(name)
    if computation is None:
        return
    for instruction in computation.instructions.values():
        yield instruction, computation
        if instruction.opcode == "fusion":
            for inner in instruction.called("calls"):
                yield from _within(inner, program)


def _way(instruction: Instruction) -> int:
    """Return 0 or 1: which of the two ways round a permutation goes."""
    found = re.search(r"source_target_pairs=\{([\d{},]*)\}", instruction.attributes)
    to = {int(source): int(target) for source, target in re.findall(r"(\d+),(\d+)", found[1] if found else "")}
    back = {target: source for source, target in to.items()}
    first = min(to, default=0)
    return int(to.get(first, 0) > back.get(first, 0))


def _chain(instruction: Instruction) -> str | None:
    """Return which collective an instruction is a piece of, where the compiler cut one up."""
    found = re.search(r'chain_id="([^"]*)"', instruction.attributes)
    return found[1] if found else None
