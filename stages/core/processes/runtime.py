"""JAX's distributed runtime, and what it keeps private of it: the one module that names that.

Purpose: which cluster this is and where its first process is are JAX's own detection's; the start and the end are by
JAX's public functions.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import time
from dataclasses import dataclass

import jax
from jax._src import clusters

from stages.core.common.errors import StageError
from stages.core.processes.asked import Asked

# Seconds that the end of the others is waited for, after all have said that they are done.
SHUTDOWN = 30
# Seconds after which JAX itself takes a process for dead; the watchdog does so long before.
HEARTBEAT = 100
# Seconds for which an abort waits for the watchdog's reason.
REASON = 2.0


@dataclass(frozen=True)
class Place:
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
    _abort_later()
    # It would take SIGTERM for itself; `Group.stop_after` is how all agree on a step.
    jax.config.update("jax_enable_preemption_service", False)
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


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _wait_for_reason(number: int) -> None:
    """Sleep, so that the watchdog's thread may say why and end the process; then let it abort."""
    time.sleep(REASON)
    ctypes.CDLL(None).signal(signal.SIGABRT, 0)


def _abort_later() -> None:
    """Hold an abort up for a moment.

    JAX's client aborts its process when the coordinator is gone, with a message that names nobody and before the
    watchdog can speak. It does so in a thread of its own, where no signal handler of Python's would run.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _wait_for_reason)


def stop() -> None:
    """End JAX's runtime; what another process does then is its own affair."""
    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()
