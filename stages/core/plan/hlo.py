"""XLA's HLO as text: its computations, instructions and arrays, and how often each computation runs.

The text is XLA's HLO after all passes, one instruction a line:
    %name = f32[2,3]{1,0:T(8,128)S(1)} opcode(%operand, ...), attribute=..., ...
where S(1) and above name memories on the chip itself (operands kept there are not traffic). Tables before the first
computation say which line of Python an instruction comes from:
    FileNames         1 "/.../decoder.py"
    FunctionNames     1 "_attention"
    FileLocations     1 {file_name_id=1 function_name_id=1 line=...}
    StackFrames       1 {file_location_id=1 parent_frame_id=1}        (one more than the number of its caller)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0, "bf16": 16}

_ENTRY = re.compile(r"(\d+) (?:\"(.*)\"|\{(.*)\})$")
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)")
# JSON that is the one thing in an instruction with lines of its own.
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n(?:\".*\n)*\}")
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


@dataclass
class Computation:
    """Instructions by name, in the order of the text; `root` is the one whose result is the computation's."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass(frozen=True)
class Program:
    """Computations by name, the name of the one that it begins with, and its stack frames.

    `frames`: by its number, a frame's Python file and function, and the number of the frame that called it.
    """

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, str, int]] = field(default_factory=dict)

    def frames_of(self, instruction: Instruction) -> Iterator[tuple[str, str]]:
        """Yield the (file, function) that an instruction comes from, then those that called it."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        number = int(found[1]) if found else 0
        while number in self.frames:
            file, function, number = self.frames[number]
            yield file, function


def parse(text: str, cache_bytes: int = 0) -> Program:
    """Read a program.

    Args:
        text: `compiled.as_text()`.
        cache_bytes: results up to this size are taken to be read from a cache, not from the device's main memory.
    """
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {}
    entry, current, heading = "", None, ""
    for line in _KERNEL_METADATA.sub(lambda found: found[0].replace("\n", ""), text).splitlines():
        if current is None:
            if found := _COMPUTATION.match(line):
                current = computations[found[2]] = Computation(found[2])
                entry = found[2] if found[1] else entry
            elif found := _ENTRY.match(line):
                tables.setdefault(heading, {})[int(found[1])] = found[2] or found[3] or ""
            else:
                heading = line.strip() or heading
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[1], found[2], cache_bytes)
            if instruction:
                current.instructions[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    current.root = instruction.name
    return Program(computations, entry, _frames(tables))


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[str, str, int]]:
    """Return the stack frames of a program's tables, as `Program` has them."""

    def numbers(row: str) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}

    places = {key: numbers(row) for key, row in tables.get("FileLocations", {}).items()}
    files, functions = tables.get("FileNames", {}), tables.get("FunctionNames", {})
    frames = {}
    for key, row in tables.get("StackFrames", {}).items():
        frame = numbers(row)
        place = places.get(frame.get("file_location_id", 0), {})
        frames[key] = (
            files.get(place.get("file_name_id", 0), ""),
            functions.get(place.get("function_name_id", 0), ""),
            frame.get("parent_frame_id", 1) - 1,
        )
    return frames


def _instruction(name: str, rest: str, cache_bytes: int) -> Instruction | None:
    """Parse `type opcode(operands), attributes`."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if end <= 0 or opening < 0:
        return None
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip())
    arrays, opcode = _arrays(kind), rest[:opening]
    if cache_bytes and opcode != "parameter":
        arrays = tuple(replace(each, in_memory=each.in_memory and each.bytes > cache_bytes) for each in arrays)
    return Instruction(name, opcode, arrays, operands, rest[closing + 1 :])


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


def reached(program: Program) -> Iterator[tuple[Computation, int, bool]]:
    """Yield each computation that runs, how often, and whether it is part of a fusion."""
    computations = program.computations
    waiting = [(program.entry, 1, False)]
    while waiting:
        name, times, fused = waiting.pop()
        computation = computations.get(name)
        if computation is None:
            continue
        yield computation, times, fused
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                rounds = times * trip_count(instruction, computations)
                waiting += [(body, rounds, fused) for body in instruction.called("body")]
            elif instruction.opcode == "fusion":
                waiting += [(each, times, True) for each in instruction.called("calls")]
            elif instruction.opcode in ("call", "async-start"):
                keys = [*instruction.called("to_apply"), *instruction.called("calls")]
                waiting += [(each, times, fused) for each in keys]
            elif instruction.opcode == "conditional":
                # Which branch runs is not known; the dearest would be the honest one, and ours have none.
                waiting += [(each, times, fused) for each in instruction.called("branch_computations")[:1]]


def trip_count(instruction: Instruction, computations: dict[str, Computation]) -> int:
    """Return how often a loop runs: XLA's known trip count, else the constant in its condition, else 1."""
    if found := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', instruction.attributes):
        return int(found[1])
    for name in instruction.called("condition"):
        for each in computations[name].instructions.values() if name in computations else ():
            if each.opcode == "constant" and not each.arrays[0].dimensions and each.operands:
                return max(1, int(each.operands[0])) if each.operands[0].isdigit() else 1
    return 1


def array_of(name: str, computation: Computation) -> Array | None:
    """Return the (first) array that a computation's instruction makes."""
    found = computation.instructions.get(name)
    return found.arrays[0] if found and found.arrays else None
