"""The rehearsal: one process and several, each a real one of this machine, compared; and what differs in a real run.

Purpose: to be run before a slice is paid for. It shows that the settings, the layout and the code work on that many
processes and give the losses of one; it says nothing of networks, nor of memory and speed, of which `plan` does.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.core.cli import Run
from stages.core.common.errors import StageError
from stages.core.files import read_json, write_json
from stages.core.presets.architecture import Architecture
from stages.core.preview.dry_run import fetched
from stages.core.processes import asked
from stages.core.records.forms import policy_of
from stages.core.rehearse.shrinking import tiny

LENGTH = 64
# Seconds for one of the two runs, and how far the losses of several processes may be from those of one: sums over
# devices are in another order, and the differences of float32 rounding grow by the step.
TIME, TOLERANCE = 1800.0, {"float32": 1e-4, "mixed_bfloat16": 3e-2, "bfloat16": 3e-2}
VARIABLES = (asked.ADDRESS, asked.COUNT, asked.INDEX, asked.LAUNCHED)
LAUNCHERS = ("SLURM_", "OMPI_", "TPU_", "KUBERNETES_")


@dataclass(frozen=True)
class Rehearsal:
    """What it found: each step's loss on one process and on several, the largest difference of a trained weight, and
    the lines for the user.
    """

    alone: list[float]
    together: list[float]
    weights: float
    lines: list[str]

    @property
    def losses(self) -> float:
        """The largest relative difference of a step's loss."""
        pairs = zip(self.alone, self.together, strict=True)
        return max(abs(one - other) / max(abs(one), 1e-9) for one, other in pairs)


def rehearse(run: Run, processes: int, devices: int, steps: int) -> Rehearsal:
    """Train the fetched preset's architecture on tiny weights for a few steps, on one process and on several.

    Args:
        run: all settings, and where the preset's manifest is.
        processes: of the second run.
        devices: simulated ones of each of them.
        steps: of either run.

    Raises:
        StageError: no manifest, a process failed, or the losses differ by more than rounding.
    """
    name, architecture = fetched(run.paths)
    shape = shape_for(run.params.mesh.shape, processes * devices)
    small = tiny(architecture, shape[1])
    settings = run.params.finetune
    batch = min(settings.batch_size, 4 * shape[0])
    job = {
        "class_name": small.class_name,
        "config": small.config,
        "params": run.params.model_dump(mode="json"),
        "shape": shape,
        "steps": steps,
        "batch_size": batch,
        "length": min(LENGTH, run.params.tokenize.length),
    }
    with tempfile.TemporaryDirectory(prefix="gemma-tuning-rehearsal-") as folder:
        write_json(Path(folder) / "job.json", job)
        alone, own = _run(Path(folder), 1, run.paths.root)
        several, others = _run(Path(folder), processes, run.paths.root)
    weights = max(float(np.abs(own[path] - others[path]).max()) for path in own)
    lines = [f"{name} on tiny weights, mesh {shape[0]}x{shape[1]}: {processes} processes of {devices} devices."]
    lines += [
        f"step {i}: loss {a:.6f} on one process, {b:.6f} on {processes}"
        for i, (a, b) in enumerate(zip(alone, several, strict=True), 1)
    ]
    found = Rehearsal(alone, several, weights, lines)
    limit = TOLERANCE[policy_of(run.params.load.dtype)]
    told = f"largest relative difference of a loss {found.losses:.1e}, of a trained weight {weights:.1e} (absolute)"
    if not found.losses <= limit:
        raise StageError(f"{processes} processes must give the losses of one. Received: {told}, more than {limit:.0e}.")
    lines += [told, "In the real run these differ:", *differences(run, architecture, small, job)]
    return found


def shape_for(wanted: list[int], devices: int) -> list[int]:
    """Return the settings' mesh if it has that many devices, else one of them with a like model axis.

    Example:
        >>> shape_for([8, 8], 8), shape_for([2, 4], 8)
        ([1, 8], [2, 4])
    """
    if math.prod(wanted) == devices:
        return list(wanted)
    model = math.gcd(wanted[1], devices)
    return [devices // model, model]


def differences(run: Run, real: Architecture, small: Architecture, job: dict[str, Any]) -> list[str]:
    """Return what is not as in the real run, a line each."""
    changed = ", ".join(
        f"{key} {real.config[key]:,} -> {value:,}" for key, value in small.config.items() if real.config[key] != value
    )
    params = run.params
    lines = [f"  the weights: random ones ({changed or 'all dimensions as they are'})"]
    if list(params.mesh.shape) != job["shape"]:
        lines.append(f"  the mesh: {list(params.mesh.shape)} in params.yaml, {job['shape']} here")
    lines.append(f"  the devices: mesh.devices={params.mesh.devices}; here simulated on one CPU, which talk by gloo")
    if job["batch_size"] != params.finetune.batch_size:
        lines.append(f"  finetune.batch_size: {params.finetune.batch_size}; here {job['batch_size']}")
    lines.append(f"  the data: sequences of {params.tokenize.length} tokens; here {job['length']} random ones")
    lines.append("  not rehearsed: memory, speed, samples, checkpoints, the hosts' network, the launcher")
    return lines


def _run(folder: Path, count: int, root: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    """Run the job on some processes and return its losses and trained weights; none is left running."""
    result = folder / f"result-{count}"
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS) and name not in VARIABLES
    }
    with socket.create_server(("localhost", 0)) as listener:
        address = f"localhost:{listener.getsockname()[1]}"
    command = [sys.executable, "-m", "stages.core.rehearse.worker", str(folder / "job.json"), str(result)]
    running: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"{count}-{number}.log" for number in range(count)]
    try:
        for number, log in enumerate(logs):
            place = {asked.ADDRESS: address, asked.COUNT: str(count), asked.INDEX: str(number)} if count > 1 else {}
            with log.open("wb") as output:
                running.append(
                    subprocess.Popen(
                        command,
                        cwd=root,
                        env={**kept, **place},
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=output,
                    )
                )
        _wait(running, logs)
    finally:
        for process in running:
            process.kill()
            process.wait()
    with np.load(result.with_suffix(".npz")) as file:
        return read_json(result.with_suffix(".json")), {name: file[name] for name in file.files}


def _wait(running: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    """Wait until all have ended well.

    Raises:
        StageError: one has not; with what it said last.
    """
    deadline = time.monotonic() + TIME
    while any(process.poll() is None for process in running) and time.monotonic() < deadline:
        if any(process.poll() for process in running):
            # The others end by themselves when one fails; that they do is part of what is rehearsed.
            deadline = min(deadline, time.monotonic() + 60)
        time.sleep(0.1)
    failed = [number for number, process in enumerate(running) if process.poll() != 0]
    if failed:
        said = logs[failed[0]].read_text("utf-8", errors="replace").strip().splitlines()[-3:]
        codes = [process.poll() for process in running]
        raise StageError(f"Every process of the rehearsal must end with 0. Received: {codes}\n" + "\n".join(said))
