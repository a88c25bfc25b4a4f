"""JAX's distributed runtime, and what it keeps private of it: the one module that names that.

Purpose: which cluster this is and where its first process is are JAX's own detection's; the start and the end are by
JAX's public functions.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import jax
from jax._src import clusters
from jax._src.lib import _jax

from stages.core.common.errors import StageError
from stages.core.processes.asked import Asked

# Seconds that the end of the others is waited for, after all have said that they are done.
SHUTDOWN = 30
# Seconds after which JAX itself takes a process for dead; the watchdog does so long before.
HEARTBEAT = 100


class Place(NamedTuple):
    """Where a process is among its run's: see `jax.distributed.initialize`."""

    address: str
    count: int
    index: int
    local_devices: list[int] | None


def place_of(asked: Asked, timeout: float) -> Place:
    """Return this process's place, by JAX's cluster detection where the environment does not name it.

    Raises:
        StageError: JAX finds no such cluster here.
    """
    if asked.address is not None:
        return Place(asked.address, asked.count or 1, asked.index or 0, None)
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    try:
        address, count, index, local = detect(None, None, None, None, None, int(timeout))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise StageError(f"JAX must find the processes that {asked.by} started. Received: {error}") from error
    if address is None or count is None or index is None:
        raise StageError(
            f"JAX must find the processes that {asked.by} started. Received: no cluster that it knows\n"
            "Name them by COORDINATOR_ADDRESS (host:port of process 0), NUM_PROCESSES and PROCESS_ID."
        )
    return Place(address, count, index, list(local) if local is not None else None)


def start(place: Place, timeout: float) -> None:
    """Start JAX's runtime; all processes are there already.

    Raises:
        StageError: it did not start.
    """
    made = _jax.get_distributed_runtime_client

    def client(*args: object, **options: object) -> object:
        # JAX would end the process by a signal, with a message that names nobody, before the watchdog's is shown.
        return made(*args, **options, missed_heartbeat_callback=lambda status: None)

    _jax.get_distributed_runtime_client = client
    try:
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except RuntimeError as error:
        raise StageError(
            f"JAX's runtime must start on all processes. Received: {' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        _jax.get_distributed_runtime_client = made


def stop() -> None:
    """End JAX's runtime; what another process does then is its own affair."""
    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()
