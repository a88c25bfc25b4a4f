"""Arrays on devices and their parts on the host: copied for a checkpoint, and read from one.

Purpose: a process has to do with its own devices' parts alone, so that what it holds and writes stays its share of a
state that may be larger than any host.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from stages.core.finetune.pieces import Index, Piece
from stages.core.finetune.resuming import Checkpoint
from stages.core.processes.group import current
from stages.core.sharding import hosts

Start = tuple[int, ...]


@dataclass(frozen=True)
class HostCopy:
    """The parts of an array that this process's devices hold, each once, on the host by where they begin."""

    shape: tuple[int, ...]
    sharding: jax.sharding.Sharding
    parts: Mapping[Start, np.ndarray]
    own: frozenset[Start]

    def array(self) -> jax.Array:
        """Return the array on the devices again."""
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.parts[_start(index)])

    def pieces(self, name: str) -> list[Piece]:
        """Return the parts that this process writes: over all processes each is written once."""
        return [Piece(name, start, self.shape, self.parts[start]) for start in sorted(self.own)]


def host_copy(name: str, value: jax.Array, *, own_only: bool = False) -> HostCopy:
    """Copy what this process's devices hold of an array; the next step may reuse the devices' memory at once.

    Of equal parts on several devices one writes, chosen by the array's name, so that processes that hold copies of all
    share the writing.

    Args:
        name: of the array.
        value: on devices.
        own_only: copy just the parts that this process writes.
    """
    writer = _writer(name, value)
    parts: dict[Start, np.ndarray] = {}
    own = set()
    for shard in value.addressable_shards:
        start = _start(shard.index)
        writes = shard.replica_id == writer and (current().first or not value.is_fully_addressable)
        if writes:
            own.add(start)
        if start not in parts and (writes or not own_only):
            parts[start] = _on_host(shard.data)
    return HostCopy(value.shape, value.sharding, parts, frozenset(own))


def begin_copying(name: str, value: jax.Array) -> None:
    """Have the parts that this process writes copied to the host, without waiting: many copies overlap."""
    writer = _writer(name, value)
    for shard in value.addressable_shards:
        if shard.replica_id == writer:
            shard.data.copy_to_host_async()


def whole_piece(name: str, value: jax.Array) -> list[Piece]:
    """Gather an array on the first process, a copy of its own; all processes are to call it in the same order."""
    gathered = hosts.whole(value)
    return [Piece.of_all(name, np.array(gathered))] if current().first else []


def restored(checkpoint: Checkpoint, name: str, like: jax.Array) -> jax.Array:
    """Return an array of a checkpoint, sharded as another; to be called by all processes in the same order.

    Each process reads the slices of its own devices, or has the first one's where only that can read the files.

    Args:
        checkpoint: from `resuming.newest`.
        name: of the array.
        like: has its shape, dtype and sharding.

    Raises:
        ValueError: the checkpoint does not hold it in this shape.
    """
    files = checkpoint.files
    if files is not None and files.shapes.get(name) != like.shape:
        raise ValueError(f"the checkpoint holds {name} in the shape {files.shapes.get(name)}, not {like.shape}")
    if files is None or not checkpoint.read_by_all:
        value = hosts.from_first(files.read(name) if files else None, like.shape, like.dtype)
        return hosts.put(value, like.sharding)

    @functools.cache
    def read(start: Start, stop: Start) -> np.ndarray:
        return files.read(name, tuple(map(slice, start, stop)))

    def of_device(index: Index) -> np.ndarray:
        ends = [each.indices(size) for each, size in zip(index, like.shape, strict=True)]
        return read(tuple(first for first, _, _ in ends), tuple(last for _, last, _ in ends))

    return jax.make_array_from_callback(like.shape, like.sharding, of_device)


def _writer(name: str, value: jax.Array) -> int:
    """Return which replica of an array's parts is written."""
    parts = math.prod(value.shape) // math.prod(value.sharding.shard_shape(value.shape))
    return zlib.crc32(name.encode()) % (len(value.sharding.device_set) // parts)


def _start(index: Index) -> Start:
    return tuple(each.start or 0 for each in index)


def _on_host(data: jax.Array) -> np.ndarray:
    """Return a copy; NumPy would look into a CPU device's own memory, which the next step overwrites."""
    values = np.asarray(data)
    return values.copy() if next(iter(data.devices())).platform == "cpu" else values
