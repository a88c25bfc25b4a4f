"""Before a run on real devices: what the plan found for it; and after any run, how far off the plan was.

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
from stages.core.records.finetune import FinetuneMetrics
from stages.core.records.model_config import ModelConfig
from stages.core.records.plan import PlanFile, RunKey, rules_of
from stages.core.records.planned import beside, targets_of

logger = logging.getLogger(__name__)


def warn_if_planned_not_to_fit(root: Path, run: RunKey, device_bytes: int | None) -> None:
    """Warn where the plan found that this very run does not fit, or needs more than the devices have.

    Args:
        root: the repository's folder.
        run: what is known of the run, from `run_of`.
        device_bytes: memory of one device as the backend reports it; None where it does not.
    """
    plan = _read(root)
    for label, target in plan.targets.items() if plan else ():
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


def tell_beside_plan(root: Path, run: RunKey, measured: FinetuneMetrics) -> None:
    """Log what was planned of a run next to what it measured, where the plan has it on the devices that it ran on.

    Args:
        root: the repository's folder.
        run: what is known of the run, from `run_of`.
        measured: its metrics.
    """
    plan = _read(root)
    platform = jax.local_devices()[0].platform
    for target in targets_of(plan, run, platform, measured) if plan else ():
        for each in beside(target, measured):
            planned, found = (
                f"{value * 1e3:,.1f} ms" if each.seconds else gibibytes(value)
                for value in (each.planned, each.measured)
            )
            least = "at least " if each.at_least else ""
            logger.info(
                f"{each.what}: {least}{planned} planned, {found} measured ({each.planned / each.measured:.2f})."
            )


def _read(root: Path) -> PlanFile | None:
    """Return the plan, None where there is none that can be read."""
    try:
        return PlanFile.model_validate_json((root / PLAN).read_bytes())
    except (OSError, ValueError):
        return None


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
        rules=rules_of(config.layout),
        shard_over_batch=config.layout.shard_over_batch,
        dtype=config.dtype,
        step="ours",
        length=length,
        **(settings.step_key if settings else {}),
    )
