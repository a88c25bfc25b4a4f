"""Before a run on real devices: what the plan found for it.

A run that will not fit is reported before the accelerator's time is spent, not when it runs out of memory. It changes
nothing but messages, so no stage depends on the plan.
Reads: `data/sharding/plan.json`, where it exists.
"""

from __future__ import annotations

import logging
from pathlib import Path

import jax

from stages.core.common.paths import PLAN
from stages.core.common.sizes import gibibytes
from stages.core.config.schema import Finetune
from stages.core.records.model_config import ModelConfig
from stages.core.records.plan import PlanFile, RunKey

logger = logging.getLogger(__name__)


def warn_if_planned_not_to_fit(root: Path, run: RunKey, device_bytes: int | None) -> None:
    """Warn where the plan found that this very run does not fit, or needs more than the devices have.

    Args:
        root: the repository's folder.
        run: what is known of the run, from `run_of`.
        device_bytes: memory of one device as the backend reports it; None where it does not.
    """
    try:
        targets = PlanFile.model_validate_json((root / PLAN).read_bytes()).targets
    except (OSError, ValueError):
        return
    for label, target in targets.items():
        if not run.matches(target):
            continue
        needed = target.needed_bytes_per_device
        if not target.fits:
            size = f" it needs {gibibytes(needed)} per device" if needed else ""
            logger.warning(f"by the plan this run does not fit on {target.topology}:{size} ({label}).")
        elif needed and device_bytes and needed > device_bytes:
            logger.warning(
                f"by the plan this run needs {gibibytes(needed)} per device, and those here have "
                f"{gibibytes(device_bytes)} ({label})."
            )


def warn_before_running(root: Path, run: RunKey) -> None:
    """Do that for the devices of this process; simulated ones share the host's memory, so there is no warning."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        limit = (device.memory_stats() or {}).get("bytes_limit")
        warn_if_planned_not_to_fit(root, run, limit)


def run_of(config: ModelConfig, settings: Finetune | None = None, length: int | None = None) -> RunKey:
    """Return what is known of a run: the loaded model, and how it is trained.

    Args:
        config: of the model, as in `models/<variant>/model.json`.
        settings: of `finetune`; None in `load`.
        length: tokens per sequence.
    """
    return RunKey(
        preset=config.preset,
        mesh=list(config.mesh.shape),
        layout=config.layout.name,
        dtype=config.dtype,
        step="ours",
        length=length,
        **(settings.step_key if settings else {}),
    )
