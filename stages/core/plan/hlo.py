"""Costs of a compiled program, read from its HLO: matrix products, collectives and memory traffic.

Purpose: XLA's own cost analysis counts the body of a loop once, and its `optimal_seconds` was seen to be negative. Here
the program's text is read, and a loop's body is counted once per iteration.

The text is XLA's HLO after all passes, one instruction a line:
    %name = f32[2,3]{1,0:T(8,128)S(1)} opcode(%operand, ...), attribute=..., ...
where S(1) and above name memories on the chip itself (operands kept there are not traffic).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Instructions without memory traffic: they name, bundle or control others.
FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
        "opt-barrier",
        "domain",
        "custom-call-done",
        "async-update",
    ]
)
BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0, "bf16": 16}

_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")


@dataclass(frozen=True)
class Array:
    """An array in a type: bits per element, dimensions, and whether it is in the device's main memory."""

    bits: int
    dimensions: tuple[int, ...]
    in_memory: bool

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return self.elements * self.bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    def called(self, key: str) -> list[str]:
        """Names of the computations in an attribute such as `calls=` or `branch_computations=`."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found[1]) if found else []


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind, as often as they run.

    `bytes` is what a device hands in or gets, the larger; `wire_bytes` the minimum that it must send: a ring's share
    (https://arxiv.org/abs/1802.05799).
    """

    count: int
    bytes: int
    wire_bytes: int


@dataclass(frozen=True)
class ProgramCosts:
    """Costs of one run of the program on one device.

    `pass_flops`: the matrix flops, each as often as a TPU's bfloat16 units do it for the precision that is asked for.
    """

    matrix_flops: int
    pass_flops: int
    memory_bytes: int
    collectives: dict[str, Collective]

    @property
    def wire_bytes(self) -> int:
        """Bytes that the device must send to others."""
        return sum(each.wire_bytes for each in self.collectives.values())


@dataclass
class _Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


def costs(text: str) -> ProgramCosts:
    """Return what a compiled program does.

    Args:
        text: `compiled.as_text()` of a program for one device of many (SPMD).
    """
    computations, entry = _parse(text)
    flops = pass_flops = traffic = 0
    kinds: dict[str, list[int]] = {}
    chains: set[str] = set()
    for computation, times, fused in _reached(computations, entry):
        for instruction in computation.instructions.values():
            product = times * _matrix_flops(instruction, computation)
            flops += product
            pass_flops += product * _passes(instruction, computation)
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and _begins(instruction, chains):
                size, wire = _collective_bytes(instruction, computation, kind)
                if wire:
                    sums = kinds.setdefault(kind, [0, 0, 0])
                    for place, value in enumerate((1, size, wire)):
                        sums[place] += times * value
            if not fused:
                traffic += times * _traffic(instruction, computation, computations)
    return ProgramCosts(flops, pass_flops, traffic, {kind: Collective(*kinds[kind]) for kind in sorted(kinds)})


def largest_buffers(text: str, count: int) -> list[dict[str, Any]]:
    """Return the largest arrays that a compiled program makes in the device's main memory, each kind once.

    Args:
        text: as for `costs`.
        count: maximum number.

    Returns:
        `bytes`, `shape` and `operator` (where in the model it is made), the largest first.
    """
    computations, entry = _parse(text)
    found: dict[tuple[str, str], int] = {}
    for instruction in computations[entry].instructions.values():
        if instruction.opcode in FREE or instruction.opcode.endswith(("-done", "-start")):
            continue
        operator = re.search(r'op_name="([^"]*)"', instruction.attributes)
        for array in instruction.arrays:
            if array.in_memory:
                shape = f"{array.bits} bits x {' x '.join(map(str, array.dimensions))}"
                found[shape, operator[1] if operator else ""] = array.bytes
    ordered = sorted(found.items(), key=lambda each: (-each[1], each[0]))
    return [{"bytes": size, "shape": shape, "operator": operator} for (shape, operator), size in ordered[:count]]


def _begins(instruction: Instruction, chains: set[str]) -> bool:
    """Whether a collective is not yet counted: a TPU's runs through several fusions, and is listed in each of them."""
    found = re.search(r'chain_id="([^"]*)"', instruction.attributes)
    if found is None:
        return True
    new = found[1] not in chains
    chains.add(found[1])
    return new


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if found := _COMPUTATION.match(line):
                current = computations[found[2]] = _Computation(found[2])
                entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[1], found[2])
            if instruction:
                current.instructions[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    current.root = instruction.name
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction | None:
    """Parse `type opcode(operands), attributes`."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if end <= 0 or opening < 0:
        return None
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip())
    return Instruction(name, rest[:opening], _arrays(kind), operands, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Return where the parenthesis that opens at a place closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)


def _split(text: str) -> list[str]:
    """Split at the commas outside of any bracket."""
    parts, depth, begin = [], 0, 0
    for place, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[begin:place])
            begin = place + 1
    return [*parts, text[begin:]]


def _arrays(kind: str) -> tuple[Array, ...]:
    found = []
    for name, dimensions, layout in _ARRAY.findall(kind):
        digits = re.search(r"\d+", name)
        bits = BITS.get(name, int(digits[0]) if digits else 32)
        sizes = tuple(int(size) for size in dimensions.split(",") if size)
        found.append(Array(bits, sizes, not re.search(r"S\([1-9]", layout)))
    return tuple(found)


def _reached(computations: dict[str, _Computation], entry: str) -> Iterator[tuple[_Computation, int, bool]]:
    """Yield each computation that runs, how often, and whether it is part of a fusion."""
    waiting = [(entry, 1, False)]
    while waiting:
        name, times, fused = waiting.pop()
        computation = computations.get(name)
        if computation is None:
            continue
        yield computation, times, fused
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                rounds = times * _trip_count(instruction, computations)
                waiting += [(body, rounds, fused) for body in instruction.called("body")]
            elif instruction.opcode == "fusion":
                waiting += [(each, times, True) for each in instruction.called("calls")]
            elif instruction.opcode in ("call", "async-start"):
                keys = [*instruction.called("to_apply"), *instruction.called("calls")]
                waiting += [(each, times, fused) for each in keys]
            elif instruction.opcode == "conditional":
                # Which branch runs is not known; the dearest would be the honest one, and ours have none.
                waiting += [(each, times, fused) for each in instruction.called("branch_computations")[:1]]


def _trip_count(instruction: Instruction, computations: dict[str, _Computation]) -> int:
    """Return how often a loop runs: XLA's known trip count, else the constant in its condition, else 1."""
    if found := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', instruction.attributes):
        return int(found[1])
    for name in instruction.called("condition"):
        for each in computations[name].instructions.values() if name in computations else ():
            if each.opcode == "constant" and not each.arrays[0].dimensions and each.operands:
                return max(1, int(each.operands[0])) if each.operands[0].isdigit() else 1
    return 1


def _matrix_flops(instruction: Instruction, computation: _Computation) -> int:
    """Return the flops of a matrix product (2 for a multiplication and an addition), 0 for anything else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    left, right = (_array_of(name, computation) for name in instruction.operands[:2])
    out = instruction.arrays[0]
    if left is None or right is None:
        return 0
    if instruction.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        dimensions = [int(each) for each in found[1].split(",") if each] if found else []
        return 2 * out.elements * math.prod(left.dimensions[each] for each in dimensions)
    # XLA:TPU writes products as convolutions; a batch dimension becomes a spatial one, whose window is mostly padding.
    labels = re.search(r"dim_labels=([\w]+)_([\w]+)->([\w]+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"a convolution names its dimensions. Received: {instruction.attributes}")
    inputs, kernel, outputs = labels.groups()
    window = _window(instruction.attributes)
    products = out.dimensions[outputs.index("b")] * out.dimensions[outputs.index("f")]
    products *= right.dimensions[kernel.index("i")]
    for axis in range(len(inputs) - 2):
        label = str(axis)
        products *= _valid_positions(
            left.dimensions[inputs.index(label)],
            right.dimensions[kernel.index(label)],
            out.dimensions[outputs.index(label)],
            {key: values[axis] for key, values in window.items() if axis < len(values)},
        )
    return 2 * products


def _passes(instruction: Instruction, computation: _Computation) -> int:
    """Return how often a TPU multiplies for a matrix product: its units take bfloat16 numbers.

    At the highest precision a float32 number is three of them, and of nine products the three smallest are left out
    (https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.Precision); otherwise it is rounded to one.
    """
    if "operand_precision={highest,highest}" not in instruction.attributes:
        return 1
    arrays = (_array_of(name, computation) for name in instruction.operands[:2])
    wide = sum(array is not None and array.bits == 32 for array in arrays)
    return (1, 3, 6)[wide]


def _window(attributes: str) -> dict[str, list[tuple[int, ...]]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    window: dict[str, list[tuple[int, ...]]] = {}
    for entry in found[1].split() if found else ():
        key, _, values = entry.partition("=")
        window[key] = [tuple(int(each) for each in value.split("_")) for value in values.split("x")]
    return window


def _valid_positions(size: int, kernel: int, out: int, window: dict[str, tuple[int, ...]]) -> int:
    """Return how many (output, kernel) positions along a dimension meet an element, not padding or a hole."""
    stride = window.get("stride", (1,))[0]
    low = window.get("pad", (0, 0))[0]
    hole, step = window.get("lhs_dilate", (1,))[0], window.get("rhs_dilate", (1,))[0]
    end = (size - 1) * hole + 1
    count = 0
    for place in range(out):
        first = place * stride - low
        count += sum(1 for k in range(kernel) if 0 <= first + k * step < end and (first + k * step) % hole == 0)
    return count


def _array_of(name: str, computation: _Computation) -> Array | None:
    found = computation.instructions.get(name)
    return found.arrays[0] if found and found.arrays else None


def _collective_bytes(instruction: Instruction, computation: _Computation, kind: str) -> tuple[int, int]:
    """Return the bytes that a device hands in or gets (the larger), and those it must send."""
    members = _group_size(instruction)
    given = sum(
        array.bytes
        for name in instruction.operands
        for array in (computation.instructions[name].arrays if name in computation.instructions else ())[:1]
    )
    if kind == "collective-permute":
        return given, given
    if members < 2:
        return 0, 0
    if kind == "all-gather":
        return given * members, given * (members - 1)
    share = given * (members - 1) // members
    return given, 2 * share if kind == "all-reduce" else share


def _group_size(instruction: Instruction) -> int:
    """Return how many devices take part together.

    `[2,4]<=[8]` is two groups of four, `{{0,1},{2,3}}` two of two, and `mesh['a'=2,'b'=4] {'b'}` two of four; there
    `'b':(2)2` is a part of an axis, of size 2.
    """
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", instruction.attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{('[^}]*)\}", instruction.attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    raise ValueError(f"A collective must name its groups. Received: {instruction.attributes[:200]}")


def _traffic(instruction: Instruction, computation: _Computation, computations: dict[str, _Computation]) -> int:
    """Return the bytes that an instruction reads from and writes to the device's main memory."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    results = instruction.arrays
    if opcode != instruction.opcode:
        # What begins an operation names its result next to its operand: copies first, all others second.
        results = results[:1] if opcode == "copy" else results[1:2]
    written = sum(each.bytes for each in results if each.in_memory)
    read = [_read_bytes(name, computation) for name in instruction.operands]
    if opcode in ("dynamic-slice", "slice", "gather"):
        read[0] = min(read[0], sum(each.bytes for each in results))
    elif opcode == "dynamic-update-slice":
        return 2 * _read_bytes(instruction.operands[1], computation)
    elif opcode == "fusion":
        for name in instruction.called("calls"):
            if name in computations:
                return _fusion_traffic(read, written, computations[name], computations)
    return sum(read) + written


def _fusion_traffic(read: list[int], written: int, fused: _Computation, computations: dict[str, _Computation]) -> int:
    """Count only the slices of what a fusion slices, and only the update of what it updates in place."""
    for name, number in _parameters(fused).items():
        if number < len(read):
            read[number] = min(read[number], _touched(name, read[number], fused, computations))
    root = fused.instructions.get(_unwrapped(fused.root, fused))
    if root is not None and root.opcode == "dynamic-update-slice":
        update = _array_of(root.operands[1], fused)
        written = min(written, update.bytes if update else written)
    return sum(read) + written


def _parameters(computation: _Computation) -> dict[str, int]:
    return {
        each.name: int(each.operands[0])
        for each in computation.instructions.values()
        if each.opcode == "parameter" and each.operands and each.operands[0].isdigit()
    }


def _touched(name: str, whole: int, fused: _Computation, computations: dict[str, _Computation]) -> int:
    """Return how many bytes of a value a fusion reads: its slices, through bitcasts and fusions within, or all."""
    total = 0
    for user in fused.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += user.arrays[0].bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.opcode in ("bitcast", "reshape"):
            total += _touched(user.name, whole, fused, computations)
        elif user.opcode == "fusion" and user.called("calls")[0] in computations:
            inner = computations[user.called("calls")[0]]
            place = user.operands.index(name)
            parameter = next(each for each, number in _parameters(inner).items() if number == place)
            if parameter == _unwrapped(inner.root, inner):
                total += _touched(user.name, whole, fused, computations)
            else:
                total += _touched(parameter, whole, inner, computations)
        else:
            return whole
    return min(total, whole)


def _unwrapped(name: str, computation: _Computation) -> str:
    """Return the value that a chain of bitcasts is another view of."""
    while (found := computation.instructions.get(name)) and found.opcode in ("bitcast", "reshape"):
        name = found.operands[0]
    return name


def _read_bytes(name: str, computation: _Computation) -> int:
    found = computation.instructions.get(name)
    if found is None or found.opcode in ("constant", "iota"):
        return 0
    return sum(each.bytes for each in found.arrays[:1] if each.in_memory)
