"""Whether the environment asks this process to join others, read from its variables alone.

Purpose: a process joins only where a coordinator is named or a launcher says that it started more than one. A machine
whose variables merely look like several hosts (Kaggle's TPU v5e-8) stays alone.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.core.common.errors import ParamsError, StageError, shown

ADDRESS, COUNT, INDEX = "COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"
LAUNCHED = "GEMMA_TUNING_LAUNCHED"
# Launchers, and their variables with the number of processes and this process's.
SLURM = ("SLURM_NTASKS", "SLURM_PROCID")
OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
LAUNCHERS = {"Slurm": SLURM, "Open MPI": OPEN_MPI}
# All that JAX's detection of Slurm reads: a batch script outside of `srun` lacks the step's.
SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID", *SLURM)
# JAX reads it to find Open MPI, and from version 5 on Open MPI no longer sets it.
OPEN_MPI_ADDRESS = "OMPI_MCA_orte_hnp_uri"
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"


@dataclass(frozen=True)
class Asked:
    """That this process is one of several.

    `address` (host:port of the first process), `count` and `index` are None where JAX's cluster detection finds them.
    """

    by: str
    address: str | None = None
    count: int | None = None
    index: int | None = None


def asked(environment: Mapping[str, str], tpu_workers: Callable[[], int] = lambda: 1) -> Asked | None:
    """Return what the environment asks for; None: this process is alone.

    Args:
        environment: its variables.
        tpu_workers: returns how many hosts the slice of this TPU VM has, where no variable says it.

    Raises:
        ParamsError: a coordinator without the number of processes or this one's, or numbers that do not fit.
    """
    launcher = next((name for name, (count, _) in LAUNCHERS.items() if _number(environment, count) > 1), None)
    if ADDRESS in environment:
        return _named(environment, launcher)
    if launcher == "Slurm" and all(name in environment for name in SLURM_STEP):
        return Asked("Slurm")
    if launcher == "Open MPI":
        if OPEN_MPI_ADDRESS in environment:
            return Asked("Open MPI")
        raise ParamsError(
            f"Open MPI 5 names no coordinator: {ADDRESS} must be set. Received: {OPEN_MPI[0]}="
            f"{shown(environment[OPEN_MPI[0]])}, no {ADDRESS}\n"
            f"Run `mpirun -x {ADDRESS}=HOST:PORT ...` with the name of the first host and a free port on it."
        )
    if any(name.startswith("KAGGLE_") for name in environment):
        return None
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return Asked("Kubernetes")
    for name in TPU_HOSTS:
        if name in environment:
            # GKE lists the slice's hosts; a machine of its own has one, `localhost` or `local`.
            return Asked("TPU") if len({host for host in environment[name].split(",") if host}) > 1 else None
    return Asked("TPU") if tpu_workers() > 1 else None


def must_be_joined(environment: Mapping[str, str]) -> None:
    """Refuse a process that `mesh.launcher` started and that does not find the others: each would run alone.

    Raises:
        StageError: it is such a process, and no launcher says that it is the only one.
    """
    told_alone = any(_number(environment, count) == 1 for count, _ in LAUNCHERS.values())
    if LAUNCHED in environment and not told_alone:
        raise StageError(
            f"A process that mesh.launcher starts must find the others. Received: no {ADDRESS}, and no variables of "
            f"Slurm, Open MPI, Kubernetes or a TPU slice\nLet the launcher set {ADDRESS} (host:port of process 0), "
            f"{COUNT} and {INDEX}."
        )


def hosts_of_this_slice(devices: Path = Path("/dev")) -> int:
    """Return how many hosts the slice of this TPU VM has, as Google's metadata server says; 1 where it is no TPU VM."""
    if not [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]:
        return 1
    request = urllib.request.Request(METADATA, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3) as answer:
            return len(answer.read(1 << 20).decode().split(","))
    except (OSError, UnicodeDecodeError):
        return 1


def _named(environment: Mapping[str, str], launcher: str | None) -> Asked | None:
    """Return what is asked for by the coordinator's address, with the launcher's numbers where none are given."""
    count_name, index_name = LAUNCHERS[launcher] if launcher and COUNT not in environment else (COUNT, INDEX)
    address, count, index = (environment.get(name) for name in (ADDRESS, count_name, index_name))
    host, _, port = (address or "").rpartition(":")
    fits = count is not None and index is not None and count.isdecimal() and index.isdecimal()
    if not (host and port.isdecimal() and fits and int(index or 0) < int(count or 0)):
        received = {ADDRESS: address, count_name: count, index_name: index}
        raise ParamsError(
            f"A process that is to join others must have {ADDRESS} (host:port of process 0), {COUNT} and {INDEX} "
            f"(from 0, below {COUNT}). Received: "
            + ", ".join(f"{name}={shown(value)}" for name, value in received.items())
        )
    return Asked(ADDRESS, address, int(count or 1), int(index or 0)) if int(count or 1) > 1 else None


def _number(environment: Mapping[str, str], name: str) -> int:
    """Return a variable's number; 0 where it is none."""
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0
