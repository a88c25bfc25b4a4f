"""Costs of a compiled program, read from its HLO: matrix products, collectives and memory traffic.

Purpose: XLA's own cost analysis counts the body of a loop once, and its `optimal_seconds` was seen to be negative. Here
the program's text is read, and a loop's body is counted once per iteration.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from stages.core.plan.hlo import Computation, Instruction, Program, array_of, reached

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


# A matrix product of a GPU's library (cuBLAS), with the dimensions of the first operand that it sums over.
_LIBRARY = re.compile(r'custom_call_target="__cublas.*?"lhs_contracting_dimensions":\[([^\]]*)\]')
# A kernel of model/attention_splash.py: the flops of one product of its queries and keys, and which kernel it is.
_KERNEL = re.compile(r"kernel_product_flops_(\d+).*splash_\w*?_(fwd|dq|dkv)_")
# A TPU's kernel for a product of model/experts.py, whose name contains its flops.
_RAGGED = re.compile(r'custom_call_target="tpu_custom_call".*ragged_product_flops_(\d+)')
# Products of that size in each: of queries and keys, of weights and values; and with the gradient, of each of the four.
KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


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
    `float32_flops`: those of them that are asked for in float32, which a GPU does outside of its matrix units.
    """

    matrix_flops: int
    pass_flops: int
    float32_flops: int
    memory_bytes: int
    collectives: dict[str, Collective]

    @property
    def wire_bytes(self) -> int:
        """Bytes that the device must send to others."""
        return sum(each.wire_bytes for each in self.collectives.values())


def costs(program: Program) -> ProgramCosts:
    """Return what a compiled program, for one device of many (SPMD), does."""
    computations = program.computations
    flops = pass_flops = float32_flops = traffic = 0
    kinds: dict[str, list[int]] = {}
    chains: set[str] = set()
    for computation, times, fused in reached(program):
        for instruction in computation.instructions.values():
            if product := times * _matrix_flops(instruction, computation):
                times_more = passes(instruction, computation)
                flops += product
                pass_flops += product * times_more
                float32_flops += product if times_more > 1 else 0
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and _begins(instruction, chains):
                size, wire = collective_bytes(instruction, computation, kind)
                if wire:
                    sums = kinds.setdefault(kind, [0, 0, 0])
                    for place, value in enumerate((1, size, wire)):
                        sums[place] += times * value
            if not fused:
                traffic += times * _traffic(instruction, computation, computations)
    return ProgramCosts(
        flops, pass_flops, float32_flops, traffic, {kind: Collective(*kinds[kind]) for kind in sorted(kinds)}
    )


def largest_buffers(program: Program, count: int) -> list[dict[str, Any]]:
    """Return the largest arrays that a compiled program makes in the device's main memory, each kind once.

    Args:
        program: as for `costs`.
        count: maximum number.

    Returns:
        `bytes`, `shape` and `operator` (where in the model it is made), the largest first.
    """
    found: dict[tuple[str, str], int] = {}
    for instruction in program.computations[program.entry].instructions.values():
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


def _matrix_flops(instruction: Instruction, computation: Computation) -> int:
    """Return the flops of a matrix product (2 for a multiplication and an addition), 0 for anything else."""
    if kernel := kernel_flops(instruction):
        return kernel
    library = instruction.opcode == "custom-call" and _LIBRARY.search(instruction.attributes)
    if instruction.opcode not in ("dot", "convolution") and not library:
        return 0
    left, right = (array_of(name, computation) for name in instruction.operands[:2])
    out = instruction.arrays[0]
    if left is None or right is None:
        return 0
    if library:
        dimensions = [int(each) for each in re.findall(r"\d+", library[1])]
        return 2 * out.elements * math.prod(left.dimensions[each] for each in dimensions)
    if instruction.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        dimensions = [int(each) for each in found[1].split(",") if each] if found else []
        return 2 * out.elements * math.prod(left.dimensions[each] for each in dimensions)
    # XLA:TPU writes products as convolutions; a batch dimension becomes a spatial one, whose window is mostly padding.
    labels = re.search(r"dim_labels=([\w]+)_([\w]+)->([\w]+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"a convolution names its dimensions. Received: {instruction.attributes}")
    inputs, weights, outputs = labels.groups()
    window = _window(instruction.attributes)
    products = out.dimensions[outputs.index("b")] * out.dimensions[outputs.index("f")]
    products *= right.dimensions[weights.index("i")]
    for axis in range(len(inputs) - 2):
        label = str(axis)
        products *= _valid_positions(
            left.dimensions[inputs.index(label)],
            right.dimensions[weights.index(label)],
            out.dimensions[outputs.index(label)],
            {key: values[axis] for key, values in window.items() if axis < len(values)},
        )
    return 2 * products


def kernel_flops(instruction: Instruction) -> int:
    """Return the flops of an attention kernel or a product of experts, opaque to XLA; 0 for anything else."""
    if instruction.opcode != "custom-call":
        return 0
    if ragged := _RAGGED.search(instruction.attributes):
        return int(ragged[1])
    found = _KERNEL.search(instruction.attributes)
    return int(found[1]) * KERNEL_PRODUCTS[found[2]] if found else 0


def multiplies_experts(instruction: Instruction) -> bool:
    """Return whether a kernel is a product of experts."""
    return _RAGGED.search(instruction.attributes) is not None


def passes(instruction: Instruction, computation: Computation) -> int:
    """Return how often a TPU multiplies for a matrix product: its units take bfloat16 numbers.

    At the highest precision a float32 number is three of them, and of nine products the three smallest are left out
    (https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.Precision); otherwise it is rounded to one.
    """
    if multiplies_experts(instruction):
        return 6 if instruction.arrays[0].bits == 32 else 1
    if kernel_flops(instruction):
        # After the numbers of the blocks to visit come the queries, of the dtype of all that is multiplied.
        query = array_of(instruction.operands[2], computation)
        return 6 if query is not None and query.bits == 32 else 1
    if "operand_precision={highest,highest}" not in instruction.attributes:
        return 1
    arrays = (array_of(name, computation) for name in instruction.operands[:2])
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


def collective_bytes(instruction: Instruction, computation: Computation, kind: str) -> tuple[int, int]:
    """Return the bytes that a device hands in or gets (the larger), and those it must send."""
    given = sum(
        array.bytes
        for name in instruction.operands
        for array in (computation.instructions[name].arrays if name in computation.instructions else ())[:1]
    )
    if kind == "collective-permute":
        # It names pairs of devices, no groups.
        return given, given
    members = group_size(instruction)
    if members < 2:
        return 0, 0
    if kind == "all-gather":
        return given * members, given * (members - 1)
    share = given * (members - 1) // members
    return given, 2 * share if kind == "all-reduce" else share


def group_size(instruction: Instruction) -> int:
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


def _traffic(instruction: Instruction, computation: Computation, computations: dict[str, Computation]) -> int:
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


def _fusion_traffic(read: list[int], written: int, fused: Computation, computations: dict[str, Computation]) -> int:
    """Count only the slices of what a fusion slices, and only the update of what it updates in place."""
    for name, number in _parameters(fused).items():
        if number < len(read):
            read[number] = min(read[number], _touched(name, read[number], fused, computations))
    root = fused.instructions.get(_unwrapped(fused.root, fused))
    if root is not None and root.opcode == "dynamic-update-slice":
        update = array_of(root.operands[1], fused)
        written = min(written, update.bytes if update else written)
    return sum(read) + written


def _parameters(computation: Computation) -> dict[str, int]:
    return {
        each.name: int(each.operands[0])
        for each in computation.instructions.values()
        if each.opcode == "parameter" and each.operands and each.operands[0].isdigit()
    }


def _touched(name: str, whole: int, fused: Computation, computations: dict[str, Computation]) -> int:
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


def _unwrapped(name: str, computation: Computation) -> str:
    """Return the value that a chain of bitcasts is another view of."""
    while (found := computation.instructions.get(name)) and found.opcode in ("bitcast", "reshape"):
        name = found.operands[0]
    return name


def _read_bytes(name: str, computation: Computation) -> int:
    found = computation.instructions.get(name)
    if found is None or found.opcode in ("constant", "iota"):
        return 0
    return sum(each.bytes for each in found.arrays[:1] if each.in_memory)
